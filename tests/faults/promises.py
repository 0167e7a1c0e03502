"""What the protocol promises: of every step of the model, and of every state, that all will be well again."""

from itertools import pairwise

from tests.faults.server_steps import serves
from tests.faults.standings import name
from tests.faults.world import Bounds, Rules, World


def broken(rules: Rules, bounds: Bounds, w: World) -> str | None:
    """The promise that a world breaks."""
    return _of_versions(w) or _of_servers(rules, bounds, w)


def _of_versions(w: World) -> str | None:
    numbers = [number for number, _ in w.announced]
    if len(set(numbers)) < len(numbers):
        return "two trainers announced one version"
    stored = {(number, author) for number, author, _ in w.manifests}
    if any(version not in stored or version not in w.files for version in w.announced):
        return "an announced version lacks its bytes"
    # One trainer after the other: a trainer that was overtaken never publishes again.
    authors = [author for _, author in w.announced]
    if sum(a != b for a, b in pairwise(authors)) > 1:
        return "a trainer that was overtaken announced a version"
    return None


def _of_servers(rules: Rules, bounds: Bounds, w: World) -> str | None:
    for server in w.servers:
        standing = server.standing
        if not serves(rules, server):
            continue
        if server.first != server.second:
            return "mixed weights are served"
        if server.first != standing.digest:
            return "weights are served under another version's name"
        if standing.digest and standing.digest not in map(name, w.announced):
            return "weights are served that nobody announced"
        bound = bounds.max_staleness
        if bound is not None and standing.head and standing.head.version - standing.version > bound:
            return "weights are served that are staler than allowed"
    return None


def shrunk(before: World, w: World) -> str | None:
    """The promise that a step breaks: versions only grow, and what is stored stays."""
    if before.head is not None and w.head is not None and w.head[0] < before.head[0]:
        return "the head went down"
    if before.manifests is not w.manifests:
        for manifest in before.manifests - w.manifests:
            return f"version {manifest[0]} was replaced by other bytes"
    if before.servers is w.servers:
        return None
    was, now = ([s.standing.version for s in x.servers if s.stage != "down"] for x in (before, w))
    if len(was) == len(now) and sum(was) > sum(now):  # the order of the servers says nothing
        return "a server's version went down"
    return None


def well(w: World) -> bool:
    """Every server is ready at the newest version that anybody who lives remembers, and Redis knows it.

    That is the newest one announced, unless Redis restarted empty and all who knew died: then servers next hear of
    the next trainer's version, which is higher than what is in the store.
    """
    alive = [t.head for t in w.trainers if t.phase not in ("dead", "stopped")]
    heads = [s.standing.head for s in w.servers]
    told = [head.version for head in heads if head] + [head[0] for head in (*alive, w.head) if head]
    newest = max(told, default=0)
    return (w.head[0] if w.head else 0) == newest and all(
        s.stage == "idle" and s.standing.state == "ready" and s.standing.version == newest
        for s in w.servers
    )
