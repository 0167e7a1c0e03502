"""A server of the model: `server/follower.py`, an engine in two halves, and the real `server/states.py`."""

from collections.abc import Iterator

from server.states import Began, Failed, Took
from tests.faults.standings import Version, caught_up, head_of, hear, may_serve, name, stand
from tests.faults.world import Bounds, Rules, Server, World, restored, spend

Steps = Iterator[tuple[str, Server, World]]


def server_steps(rules: Rules, bounds: Bounds, w: World, s: Server) -> Steps:
    """What a server may do next: its label, the server after it, the rest of the world after it."""
    if s.stage == "down":
        yield "starts", Server(0, stage="idle"), w
        return
    if w.faults[3]:
        yield "crashes", Server(0), spend(w, 3)
    now = s.known
    if w.head:
        now = hear(now, w.head, bounds.max_staleness)
    now = caught_up(now)
    told = restored(rules, w, head_of(now))
    if now != s.known or told != w:
        yield "reads the head", s._replace(known=now), told
    yield from _take(rules, w, s)


def _take(rules: Rules, w: World, s: Server) -> Steps:
    standing, stage, version = s.standing, s.stage, name(s.target)
    if stage == "idle" and standing.head and not standing.holds_head:
        target = head_of(s.known) or s.target
        began = stand(s.known, Began(target[0]))
        yield f"begins {name(target)}", s._replace(known=began, stage="fetch", target=target), w
    elif stage == "fetch":
        if not _chain(w, s):
            yield f"finds no bytes of {version}", _failed(s), w
            return
        yield f"fetches {version}", s._replace(stage="fetched", content=version), w
        if w.faults[4]:
            yield f"damages {version}", s._replace(stage="fetched", content="?"), spend(w, 4)
    elif stage == "fetched":
        if s.content != version and rules.verified:
            yield f"refuses {version}", _failed(s), w
        else:
            yield f"writes half of {version}", s._replace(stage="half", first=s.content), w
    elif stage == "half":
        took = caught_up(stand(s.known, Took(s.target[0], version)))
        done = s._replace(known=took, second=s.content, stage="idle", target=(0, ""), content="")
        yield f"writes all of {version} and commits", done, w
        if w.faults[4]:
            yield "damages and undoes", _failed(s)._replace(first=s.second), spend(w, 4)


def _chain(w: World, s: Server) -> bool:
    """Are all bytes there, from the target back to an anchor or to what the engine holds?"""
    step: Version | None = s.target
    while step is not None and name(step) != s.first:
        base = next((m[2] for m in w.manifests if m[:2] == step), step)
        if base == step or step not in w.files:
            return False
        step = base
    return True


def _failed(s: Server) -> Server:
    return s._replace(known=stand(s.known, Failed("")), stage="idle", target=(0, ""), content="")


def serves(rules: Rules, s: Server) -> bool:
    """Does this server sample tokens now?"""
    if s.stage == "down" or (rules.paused and s.stage == "half"):
        return False
    if rules.staleness:
        return may_serve(s.known)
    return s.standing.phase == "following"
