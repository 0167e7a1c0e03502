"""Routing in numbers: affinity, load, back-off. Pure: time is a number here.

1. A question stays with its server; servers that come or go move their own share alone.
2. It leaves while that server's load is more than the slack above the least.
3. A server that failed is left alone, twice as long each time, or longer where it says so, within a bound.
4. What a request met concerns that request alone.
5. Servers with the wanted weights come first.
6. Our own trees count once, whatever a server says of its load.
7. A full server gets another tree when one of ours ends, and finds out slowly whether there is room for more.
"""

import contextlib

import pytest

from trainer.client.routing import Backoff, Router, Target, Trail, affinity

KEYS = [f"question {i}".encode() for i in range(600)]


def router(*urls: str, slack: int = 0, load: int = 0) -> Router:
    made = Router(slack=slack)
    made.update([Target(url=url, load=load) for url in urls])
    return made


def choose(
    of: Router,
    key: bytes = KEYS[0],
    *,
    version: int = 0,
    now: float = 0.0,
    trail: Trail | None = None,
) -> str:
    found = of.choose(key, version=version, now=now, trail=trail or Trail())
    assert isinstance(found, Target)
    return found.url


def test_a_server_that_goes_moves_its_own_questions_alone() -> None:
    three, two = router("a", "b", "c"), router("a", "b")
    before = {key: choose(three, key) for key in KEYS}
    after = {key: choose(two, key) for key in KEYS}
    shares = [list(before.values()).count(url) for url in "abc"]
    assert all(150 < share < 250 for share in shares)
    assert {after[key] for key in KEYS if before[key] == "c"} == {"a", "b"}
    assert all(after[key] == before[key] for key in KEYS if before[key] != "c")


@pytest.mark.parametrize(("slack", "stays"), [(0, 1), (2, 3), (5, 6)])
def test_a_question_stays_until_the_slack_is_spent(slack: int, stays: int) -> None:
    of = router("a", "b", slack=slack)
    own = choose(of)
    with contextlib.ExitStack() as trees:
        for _ in range(stays):
            assert choose(of) == own
            trees.enter_context(of.sending(own))
        assert choose(of) != own
    assert choose(of) == own


def test_without_slack_the_least_loaded_gets_it() -> None:
    of = Router(slack=0)
    of.update([Target(url="a", load=3), Target(url="b", load=1), Target(url="c", load=2)])
    assert {choose(of, key) for key in KEYS} == {"b"}


def test_away_from_home_a_question_has_a_second_home() -> None:
    of = router("a", "b", "c", slack=1)
    order = sorted("abc", key=lambda url: affinity(KEYS[0], url), reverse=True)
    with of.sending(order[0]), of.sending(order[0]):
        assert choose(of) == order[1]


def test_a_failed_server_is_left_alone_and_comes_back() -> None:
    of = router("a", "b")
    own = choose(of)
    assert of.failed(own, 10.0, None) == 0.2
    assert choose(of, now=10.1) != own
    assert choose(of, now=10.2) == own
    assert of.failed(own, 10.2, None) == 0.4
    of.answered(own)
    assert of.failed(own, 20.0, None) == 0.2


def test_with_every_server_down_the_shortest_wait_is_named() -> None:
    of = router("a", "b")
    of.failed("a", 0.0, 7.0)
    of.failed("b", 0.0, 3.0)
    assert of.choose(KEYS[0], version=0, now=1.0, trail=Trail()) == 2.0
    assert Router().choose(KEYS[0], version=0, now=1.0, trail=Trail()) is None


def test_what_a_request_met_is_its_own() -> None:
    of, trail = router("a", "b"), Trail()
    own = choose(of)
    trail.backoffs[own].failed(0.0, None)
    assert choose(of, trail=trail) != own
    assert choose(of) == own


def test_backing_off_has_a_most_and_so_has_a_retry_after() -> None:
    backoff = Backoff()
    waits = []
    for _ in range(40):
        waits.append(backoff.failed(backoff.until if backoff.failures else 0.0, None))
    assert waits[:4] == [0.2, 0.4, 0.8, 1.6]
    assert waits[-1] == 15.0
    assert backoff.failed(0.0, 20.0) == 20.0
    assert backoff.failed(0.0, 86400.0) == 60.0


def test_a_retry_after_of_nothing_does_not_end_the_backing_off() -> None:
    backoff = Backoff()
    waits = [backoff.failed(now, 0.0) for now in (0.0, 1.0, 2.0, 3.0)]
    assert waits == [0.2, 0.4, 0.8, 1.6]


def test_a_short_failure_does_not_cut_a_long_wait_short() -> None:
    backoff = Backoff()
    backoff.failed(0.0, 30.0)
    assert backoff.failed(1.0, None) <= 0.2
    assert backoff.until == 30.0


def test_servers_with_the_wanted_weights_come_first_however_loaded() -> None:
    of = Router()
    of.update([Target(url="old", version=1), Target(url="new", version=2, load=9)])
    assert choose(of, version=2) == "new"
    assert choose(of, version=1) == "old"
    assert (
        choose(of, version=3) == "old"
    )  # none is known to hold it: whoever has least to do may know better


def test_our_own_trees_count_once() -> None:
    of = router("a", "b")
    with of.sending("a"), of.sending("a"):
        of.update([Target(url="a", load=2), Target(url="b", load=3)])
        assert choose(of) == "a"
    # They have ended, and the server does not say so yet: it is not taken for the load of others.
    of.update([Target(url="a", load=2), Target(url="b", load=3)])
    assert choose(of) == "a"
    for _ in range(2):
        of.update([Target(url="a", load=5), Target(url="b", load=3)])
    assert choose(of) == "b"


def test_a_server_that_vanishes_while_it_answers_is_forgiven() -> None:
    of = router("a", "b")
    with of.sending("a"):
        of.update([Target(url="b")])
        assert {choose(of, key) for key in KEYS[:20]} == {"b"}
    of.update([Target(url="a"), Target(url="b")])
    assert {choose(of, key) for key in KEYS[:20]} == {"a", "b"}


def test_a_full_server_gets_another_tree_when_one_ends() -> None:
    of = router("a")
    with of.sending("a"), of.sending("a"):
        of.full("a", 0.0, 60.0)
        assert of.choose(KEYS[0], version=0, now=0.0, trail=Trail()) is None
    with of.sending("a"):
        assert choose(of) == "a"


def test_a_server_that_others_fill_is_left_alone() -> None:
    of = router("a")
    of.full("a", 0.0, 60.0)
    assert of.choose(KEYS[0], version=0, now=10.0, trail=Trail()) == 50.0


def test_room_is_tried_for_one_more_after_a_round_of_trees() -> None:
    of = router("a")
    with contextlib.ExitStack() as trees:
        for _ in range(4):
            trees.enter_context(of.sending("a"))
        of.full("a", 0.0, 60.0)
        for _ in range(4):
            of.answered("a")
            assert of.choose(KEYS[0], version=0, now=0.0, trail=Trail()) is None
        of.answered("a")
        assert choose(of) == "a"
