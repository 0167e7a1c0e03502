"""A trainer of the model: `trainer/lease.py`, `trainer/publish.py` and the scripts that they run."""

from collections.abc import Iterator

from tests.faults.standings import name
from tests.faults.world import Rules, Trainer, World, restored, spend

Steps = Iterator[tuple[str, Trainer, World]]


def trainer_steps(rules: Rules, w: World, t: Trainer) -> Steps:
    """What a trainer may do next: its label, the trainer after it, the rest of the world after it."""
    live = t.phase not in ("out", "dead", "stopped")
    stored = max((n for n, _, _ in w.manifests), default=0)
    newest = max(stored, w.head[0] if w.head else 0)
    if live and w.faults[0]:
        yield "crashes", Trainer(t.name, 0, "dead"), spend(w, 0)
    if live and t.phase not in ("taking", "lost", "deciding") and w.lease != (t.name, t.token):
        yield "misses its lease", t._replace(phase="lost", resume=t.phase), w
    if t.phase in ("out", "lost"):
        if not w.lease[0]:
            token = w.tokens + 1
            leased = w._replace(lease=(t.name, token), tokens=token)
            phase = "taking" if t.phase == "out" else "deciding"
            yield "acquires the lease", t._replace(phase=phase, token=token), leased
        elif t.phase == "lost":
            yield "stops: overtaken", t._replace(phase="stopped"), w
    elif t.phase == "taking":
        yield "reads the newest", t._replace(phase="ready", ours=newest), w
    elif t.phase == "deciding":
        if _foreign(rules, w, t, newest):
            yield "stops: trained by another", t._replace(phase="stopped"), w
        else:
            yield "goes on", t._replace(phase=t.resume), restored(rules, w, t.head)
    elif t.phase == "ready" and w.lease == (t.name, t.token) and restored(rules, w, t.head) != w:
        yield "restores the head", t, restored(rules, w, t.head)
    yield from _publish(rules, w, t)


def _foreign(rules: Rules, w: World, t: Trainer, newest: int) -> bool:
    """Did another trainer publish since this one took the run?"""
    if not rules.knows_its_own:
        begun = max(t.ours, t.number)
        return newest > begun or bool(
            w.head and t.head and w.head[0] == t.head[0] and w.head != t.head
        )
    versions = {(n, author) for n, author, _ in w.manifests} | ({w.head} if w.head else set())
    return any(author != t.name and number > t.ours for number, author in versions)


def _publish(rules: Rules, w: World, t: Trainer) -> Steps:
    version = (t.number, t.name)
    exists = any(n == t.number for n, _, _ in w.manifests)
    first, last = ("checked", "stored") if rules.bytes_first else ("announced", "checked")
    if t.phase == "ready" and t.left:
        used = [w.head[0] if w.head else 0, *(s.standing.version for s in w.servers)]
        if rules.folders_count:
            used += w.folders
        yield "picks a number", t._replace(phase="picked", number=max(used) + 1), w
    elif t.phase == "picked":
        if exists and rules.looks:
            yield "stops: the number is taken", t._replace(phase="stopped"), w
        else:
            yield "begins", t._replace(phase="checked"), w
    elif t.phase == first:
        kept = w.files if rules.named_by_content else {f for f in w.files if f[0] != t.number}
        stored = w._replace(folders=w.folders | {t.number}, files=frozenset(kept | {version}))
        yield f"writes files of {name(version)}", t._replace(phase="written"), stored
    elif t.phase == "written":
        # Otherwise `misses its lease` comes first, or nothing was lost.
        if w.lease == (t.name, t.token) or not rules.fenced:
            yield "confirms its lease", t._replace(phase="confirmed"), w
    elif t.phase == "confirmed":
        if exists and rules.exclusive:
            yield "stops: the number is taken", t._replace(phase="stopped"), w
            return
        others = frozenset(m for m in w.manifests if m[0] != t.number)
        written = w._replace(manifests=others | {(*version, t.base)})
        phase = "stored" if rules.bytes_first else "ready"
        yield (
            f"writes the manifest of {name(version)}",
            t._replace(phase=phase, base=version),
            written,
        )
    elif t.phase == last:
        if w.lease != (t.name, t.token) and rules.fenced:
            return  # `misses its lease`
        if w.head and w.head[0] >= t.number:
            yield "stops: the head is higher", t._replace(phase="stopped"), w
            return
        phase = "ready" if rules.bytes_first else "announced"
        done = t._replace(phase=phase, left=t.left - 1, head=version)
        yield f"announces {name(version)}", done, w._replace(
            head=version, announced=(*w.announced, version)
        )  # fmt: skip
