"""A disk that is full: at a server while it fetches, or before it decodes; at the trainer's store.

1. Full in the middle of a delta, of an anchor, or when a version is fetched and not decoded yet: the old weights
   stay and serve, the fleet table names the disk and the remedy, and once there is room the newest version is
   taken.
2. Full at the store: nothing is announced, and the trainer says so at once; it goes on once there is room, or
   stops with one clear line after its bound.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.conftest import Run
from faults.disks import Disk, disk
from faults.parts import FaultyStore, Leader, Member, until


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "disk", megabytes=16) as made:
        yield made


def told(run: Run, member: Member) -> str:
    error = until(lambda: run.failure(member.name), "the full disk is told of")
    assert isinstance(error, str)
    return error


def stays(run: Run, member: Member, held: int) -> None:
    """The old weights are in place, and served."""
    assert member.ready()
    assert member.live()["version"] == held
    run.check(member)


def test_a_full_disk_at_a_server(run: Run, small: Disk) -> None:
    store = FaultyStore(run.folder / "store")
    url = run.stack.enter_context(store.serving())
    arguments = ("--store-url", url, "--max-staleness", "5", "--share", "0.2")
    leader = run.leader(*arguments)
    run.publish(leader)
    one = run.member("one", "--weights-dir", str(small.folder), faults="second decode")
    one.wait_ready()

    # Fetched, and about to be decoded onto a disk that is full by then.
    newest = run.publish(leader)
    one.reached("second decode")
    small.fill(one.process)
    one.go_on("second decode")
    error = told(run, one)
    assert "free some room" in error, error
    assert str(small.folder) in error
    stays(run, one, newest - 1)
    small.free(one.process)
    one.wait_version(newest)

    # In the middle of a delta, then of an anchor: a trainer that starts again begins with one.
    for file in (r"delta-.*", r"weights-.*"):
        if file.startswith("weights"):
            leader.end()
            leader = run.leader(*arguments)
        store.stalled.clear()
        store.release.clear()
        store.rule(rf"/v{newest + 1:06d}/{file}", "stall")
        assert run.publish(leader) == newest + 1
        assert store.stalled.wait(60), f"{file} was never asked for"
        small.fill(one.process)
        store.release.set()
        error = told(run, one)
        assert "no room" in error, error
        assert "free some" in error, error
        assert str(small.folder) in error
        stays(run, one, newest)
        small.free(one.process)
        newest = run.publish(leader)
        one.wait_version(newest)
        run.check(one)
        until(lambda: (r := run.record("one")) and r.last_error is None, "the error is forgotten")


def goes_on(run: Run, small: Disk, leader: Leader, one: Member) -> int:
    """A version that waits for room, and comes once there is some."""
    held = max(run.published)
    small.fill(leader.process)
    leader.tell("publish")
    assert "free some room" in leader.says("status")["status"]
    stays(run, one, held)
    small.free(leader.process)
    said = leader.says("weights_digest", nth=2)
    run.published[said["version"]] = said["tensors"]
    one.wait_version(said["version"])
    run.check(one)
    return int(said["version"])


def test_a_full_disk_at_the_store(run: Run, small: Disk) -> None:
    arguments = ("--store", f"file://{small.folder}", "--share", "0.2", "--wait", "10")
    leader = run.leader(*arguments)
    one = run.member("one")
    newest = run.publish(leader)
    one.wait_ready()
    if small.mounted:  # else what it writes before it stores fails too, which is not tried again
        newest = goes_on(run, small, leader, one)

    small.fill(leader.process)
    leader.tell("publish")
    ended = leader.says("ended")["ended"]
    assert ended.startswith("WeightsError"), ended
    assert "free some room" in ended
    assert "\n" not in ended
    stays(run, one, newest)
    record = until(lambda: run.record("one"), "its record")
    assert record.head == newest, "something was announced"
    small.free(leader.process)
    newest = run.publish(run.leader(*arguments))
    one.wait_version(newest)
    run.check(one)
