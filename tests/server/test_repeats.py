"""Failures that last: said when they begin and once in a while, whatever numbers they carry."""

from server.repeats import AGAIN_S, Repeats


def test_a_failure_that_lasts_is_said_once_in_a_while_with_its_count() -> None:
    now = 0.0
    failures = Repeats(clock=lambda: now)
    assert failures.line("version 7: weights-4cf42104 at h:1: 401") is not None
    for version in range(8, 20):
        now += 1
        assert failures.line(f"version {version}: weights-{version:08x} at h:1: 401") is None
    now += AGAIN_S
    line = failures.line("version 20: weights-aa000000 at h:1: 401")
    assert line == "version 20: weights-aa000000 at h:1: 401 (12 times more since it was said last)"


def test_another_failure_and_one_after_a_success_are_said_at_once() -> None:
    failures = Repeats()
    assert failures.line("version 7: no room") is not None
    assert failures.line("version 7: nobody has it") is not None
    assert failures.line("version 7: nobody has it") is None
    failures.over()
    assert failures.line("version 8: nobody has it") == "version 8: nobody has it"
