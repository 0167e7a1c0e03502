"""Servers that die or stand still inside an update. Real processes, a real Redis, real weights.

1. A server killed while it decodes, while half of a version is written, or before it could tell anybody, comes
   back with exactly the newest weights; the others go on meanwhile.
2. A server that stands still there is dropped from the fleet table, costs nobody anything, and catches up when it
   goes on; a version that it missed is never served late.
3. A server that joins behind fifteen deltas serves the newest version at once, of an anchor and what follows it.
4. A server whose engine stands still for ever ends with one line, although its thread cannot be ended.
"""

import signal

import httpx
from faults.conftest import Run
from faults.parts import FaultyStore, Member, until

PLACES = ("decode", "apply", "taken")


def gone(run: Run, *members: Member) -> bool:
    """Are they out of the fleet table?"""
    return run.table().keys().isdisjoint(member.name for member in members)


def test_a_server_killed_inside_an_update_comes_back_whole(run: Run) -> None:
    leader = run.leader()
    steady = run.member("steady")
    broken = [run.member(place, faults=place) for place in PLACES]
    run.publish(leader)
    for one in broken:
        one.reached(one.name)
        one.send(signal.SIGKILL)
        one.faults = ""
        one.start()
    run.publish(leader, 2)
    newest = max(run.published)
    for one in (steady, *broken):
        one.wait_ready()
        one.wait_version(newest)
    run.check(steady, *broken)


def test_a_server_that_stands_still_is_dropped_and_catches_up(run: Run) -> None:
    leader = run.leader()
    steady = run.member("steady")
    still = [run.member(place, faults=f"second {place}") for place in PLACES]
    run.publish(leader)
    for one in (steady, *still):
        one.wait_ready()
    run.publish(leader)
    for one in still:
        one.reached(one.faults)
        one.send(signal.SIGSTOP)
    until(lambda: gone(run, *still), "the stopped servers leave the table")
    newest = run.publish(leader, 3)
    steady.wait_version(newest)
    for one in still:
        one.go_on(one.faults)
        one.send(signal.SIGCONT)
    for one in still:
        one.wait_version(newest)
    run.check(steady, *still)
    assert not gone(run, *still)


def test_a_late_joiner_behind_fifteen_deltas(run: Run) -> None:
    store = FaultyStore(run.folder / "store")
    url = run.stack.enter_context(store.serving())
    leader = run.leader("--store-url", url, "--anchor-every", "100")
    newest = run.publish(leader, 16)
    late = run.member("late")
    late.wait_ready()
    # Nothing before the newest was ever served: it was not ready before it held it.
    assert httpx.get(f"{late.url}/readyz").json()["version"] == newest
    run.check(late)
    full = [path for path in store.asked if "weights-" in path]
    assert len(full) == 1, "one anchor"
    assert len({path.split("/")[2] for path in store.asked if path.endswith(".json")}) == 16


def test_a_server_killed_while_it_fetches_goes_on_where_it_was(run: Run) -> None:
    store = FaultyStore(run.folder / "store")
    url = run.stack.enter_context(store.serving())
    leader = run.leader("--store-url", url)
    run.publish(leader)
    store.rule(r"/v000000/.*safetensors", "stall")
    one = run.member("one", "--weights-dir", str(run.folder / "kept"))
    assert store.stalled.wait(60)
    one.send(signal.SIGKILL)
    store.release.set()
    one.start()
    one.wait_ready()
    run.check(one)


def test_a_server_whose_engine_hangs_inside_an_update_ends(run: Run) -> None:
    leader = run.leader()
    one = run.member("one", "--liveness-timeout", "2", faults="second apply")
    run.publish(leader)
    one.wait_ready()
    run.publish(leader)
    one.reached("second apply")
    until(lambda: not one.running, "it ends", 60.0)
    assert one.process.exitcode == 1
    assert "this server ends: the engine gave no sign of life in 2 s" in one.log.read_text()
