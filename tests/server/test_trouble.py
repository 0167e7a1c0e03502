"""What is left alone, and for how long: by a clock that the test turns."""

import pytest

from server.trouble import FIRST_S, IN_A_ROW, LONGEST_S, MOST, Trouble


class Clock:
    """Turned by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_server_is_left_alone_for_longer_each_time(clock: Clock) -> None:
    trouble = Trouble(clock)
    for pause_s in (FIRST_S, 2 * FIRST_S, 4 * FIRST_S):
        trouble.failed("a")
        clock.now += pause_s - 1
        assert trouble.servers == ["a"]
        clock.now += 1
        assert trouble.servers == []
    for _ in range(100):
        trouble.failed("a")
    clock.now += LONGEST_S
    assert trouble.servers == []
    trouble.worked("a")
    trouble.failed("a")
    clock.now += FIRST_S
    assert trouble.servers == []


def test_few_are_remembered(clock: Clock) -> None:
    trouble = Trouble(clock)
    for number in range(MOST + 3):
        trouble.failed(f"{number}")
    assert trouble.servers == [f"{number}" for number in range(3, MOST + 3)]


def test_who_reaches_nobody_asks_nobody_for_a_while(clock: Clock) -> None:
    trouble = Trouble(clock)
    for number in range(IN_A_ROW - 1):
        trouble.failed(f"{number}")
    trouble.worked("x")
    for number in range(IN_A_ROW - 1):
        trouble.failed(f"{number}")
    assert not trouble.reaches_nobody
    trouble.failed("y")
    assert trouble.reaches_nobody
    clock.now += LONGEST_S
    assert not trouble.reaches_nobody
    trouble.failed("y")  # one try was enough
    assert trouble.reaches_nobody
    trouble.worked("z")
    assert not trouble.reaches_nobody


def test_redis_is_left_alone_for_as_long_as_it_cost(clock: Clock) -> None:
    trouble = Trouble(clock)
    trouble.redis_failed(0.001)
    clock.now += 0.01
    assert not trouble.redis_is_away
    trouble.redis_failed(5.0)
    clock.now += 29.0
    assert trouble.redis_is_away
    clock.now += 1.0
    assert not trouble.redis_is_away
