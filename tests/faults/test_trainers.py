"""Trainers that are killed inside a publication, stopped for too long, or two at once.

1. A trainer killed between its files, or before its manifest, leaves no version; the one after it uses another
   number, and nobody ever serves the half one.
2. A trainer that was stopped past its lease while another one published cannot publish any more: one clear line.
3. A second trainer of a run is refused with one clear line while the first one lives.
"""

import signal
from pathlib import Path

import pytest
from faults.conftest import Run
from faults.parts import until


@pytest.mark.parametrize("place", ["files", "manifest"])
def test_a_trainer_killed_mid_publish(run: Run, place: str) -> None:
    first = run.leader("--die-at", place)
    one = run.member("one")
    run.publish(first)
    one.wait_ready()
    first.tell("publish")
    assert first.says("stands")["version"] == 1
    first.send(signal.SIGKILL)
    half = Path(run.store.removeprefix("file://")) / run.name / "v000001"
    assert any(half.iterdir())
    assert not (half / "manifest.json").exists()
    second = run.leader()
    assert second.says("leads")["next"] == 2
    assert run.publish(second) == 2
    one.wait_version(2)
    run.check(one)
    until(lambda: not half.exists(), "what a dead publication left is cleaned away")


def test_a_trainer_stopped_past_its_lease_publishes_no_more(run: Run) -> None:
    first = run.leader()
    one = run.member("one")
    run.publish(first)
    one.wait_ready()
    first.send(signal.SIGSTOP)
    second = run.leader()  # waits until the lease is over
    assert run.publish(second) == 1
    one.wait_version(1)
    first.tell("publish")
    first.send(signal.SIGCONT)
    ended = first.says("ended")["ended"]
    assert ended.startswith("LeaseError"), ended
    assert "\n" not in ended
    assert "trainer" in ended
    assert run.publish(second) == 2
    one.wait_version(2)
    run.check(one)


def test_two_trainers_at_once(run: Run) -> None:
    first = run.leader()
    run.publish(first)
    second = run.leader()
    ended = second.says("ended")["ended"]
    assert ended.startswith("Lease"), ended
    assert "\n" not in ended
    assert run.publish(first) == 1
