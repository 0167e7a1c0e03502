"""Bytes that are not what they should be, or find no room. A store on a real socket that lies as it is told.

1. A flipped bit, a short file, a broken connection and a manifest that is not there are each found; the old
   weights stay and serve, the fleet table says why, and the version is taken once its bytes are right.
2. A store that stays wrong for one version does no harm to the next one.
3. A full disk leaves the old weights serving; once there is room the newest version is taken.
"""

import pytest
from faults.conftest import Run
from faults.parts import FaultyStore, until

KINDS = [("flip", "bytes"), ("truncate", "bytes"), ("cut", ""), ("missing", "manifest")]


def test_wrong_bytes_are_never_served(run: Run) -> None:
    store = FaultyStore(run.folder / "store")
    url = run.stack.enter_context(store.serving())
    leader = run.leader("--store-url", url, "--max-staleness", "3")
    run.publish(leader)
    one = run.member("one")
    one.wait_ready()
    for kind, word in KINDS:
        held = max(run.published)
        target = "manifest.json" if kind == "missing" else "delta"
        store.rule(rf"/v{held + 1:06d}/{target}", kind, times=10_000 if word else 2)
        newest = run.publish(leader)
        assert newest == held + 1
        if word:
            error = until(lambda: run.failure("one"), f"{kind} is told of")
            assert word in error, error
            store.rules[-1].times = 0
        assert one.live()["version"] in (held, newest)
        run.check(one)
        one.wait_version(newest)
        run.check(one)
        assert not any(rule.times == 2 for rule in store.rules), f"{kind} never happened"
        until(lambda: (r := run.record("one")) and r.last_error is None, "the error is forgotten")


@pytest.mark.parametrize("kind", ["flip", "missing"])
def test_a_version_that_stays_wrong_harms_no_other(run: Run, kind: str) -> None:
    store = FaultyStore(run.folder / "store")
    url = run.stack.enter_context(store.serving())
    leader = run.leader("--store-url", url, "--max-staleness", "5", "--anchor-every", "2")
    run.publish(leader)
    one = run.member("one")
    one.wait_ready()
    store.rule(r"/v000001/", kind, times=10_000)
    run.publish(leader)
    until(lambda: run.failure("one"), "the failure is told of")
    run.check(one)
    assert one.ready()
    newest = run.publish(leader)  # an anchor
    one.wait_version(newest)
    run.check(one)
