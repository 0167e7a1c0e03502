"""The protocol's promises over every interleaving; and that the model can tell a protocol that breaks them."""

import pytest

from tests.faults.explorer import Explored, explore
from tests.faults.promises import broken, shrunk, well
from tests.faults.protocol import Protocol, is_fault
from tests.faults.world import Bounds, Rules, World, start


def explored(rules: Rules, bounds: Bounds) -> Explored[World]:
    protocol = Protocol(rules, bounds)
    return explore(
        start(bounds), protocol.steps, lambda w: broken(rules, bounds, w), shrunk, well, is_fault
    )


WORLDS = {
    "two servers, a trainer dies and its successor goes on, a server dies": (
        Bounds(versions=(2, 1), trainer_crashes=1, server_crashes=1),
        40_000,
    ),
    "two servers, a trainer is paused past its lease": (
        Bounds(versions=(1, 1), expiries=1),
        15_000,
    ),
    "two trainers, each is paused, one server": (
        Bounds(versions=(1, 1), expiries=2, servers=1),
        40_000,
    ),
    "two trainers that would publish twice, one is paused": (
        Bounds(versions=(2, 2), expiries=1, servers=1),
        40_000,
    ),
    "two servers, Redis restarts empty": (Bounds(versions=(1, 1), redis_restarts=1), 15_000),
    "one server, Redis restarts empty, anybody may die once": (
        Bounds(versions=(1, 1), redis_restarts=1, trainer_crashes=1, server_crashes=1, servers=1),
        20_000,
    ),
    "two servers, three versions and no lag allowed, a damaged download, a server dies": (
        Bounds(versions=(3, 0), max_staleness=0, damages=1, server_crashes=1),
        20_000,
    ),
    "two servers, four versions and a lag of one": (
        Bounds(versions=(4, 0), max_staleness=1),
        2_000,
    ),
}


@pytest.mark.parametrize("world", WORLDS)
def test_every_interleaving_keeps_every_promise(world: str) -> None:
    bounds, at_least = WORLDS[world]
    result = explored(Rules(), bounds)
    assert result.broken is None, "\n".join((result.broken, *result.trace))
    assert result.stuck is None, "\n".join((str(result.stuck), *result.trace))
    assert result.states > at_least, "the world is smaller than its bounds allow"


@pytest.mark.parametrize(
    ("rules", "bounds", "promise", "last"),
    [
        pytest.param(
            Rules(fenced=False), Bounds(versions=(2, 1), expiries=1, servers=1),
            "a trainer that was overtaken announced a version", "A announces",
            id="announce without a look at the token",
        ),
        pytest.param(
            Rules(bytes_first=False), Bounds(versions=(1, 0), servers=1),
            "an announced version lacks its bytes", "A announces 1A",
            id="announce before the bytes",
        ),
        pytest.param(
            Rules(looks=False, exclusive=False, folders_count=False),
            Bounds(versions=(1, 1), trainer_crashes=1, servers=1),
            "version 1 was replaced by other bytes", "B writes the manifest of 1B",
            id="use a number again after a crash",
        ),
        pytest.param(
            Rules(exclusive=False), Bounds(versions=(1, 1), expiries=2, servers=0),
            "version 1 was replaced by other bytes", "writes the manifest of 1",
            id="look for a manifest first, and replace it later",
        ),
        pytest.param(
            Rules(named_by_content=False), Bounds(versions=(1, 1), expiries=1, servers=0),
            "an announced version lacks its bytes", "B announces 1B",
            id="files of one number under one name",
        ),
        pytest.param(
            Rules(knows_its_own=False),
            Bounds(versions=(2, 1), trainer_crashes=1, redis_restarts=1, servers=0),
            "a trainer that was overtaken announced a version", "A announces 3A",
            id="tell one's own versions by their numbers",
        ),
        pytest.param(
            Rules(verified=False), Bounds(versions=(1, 0), damages=1, servers=1),
            "weights are served under another version's name", "writes all of 1A and commits",
            id="commit before the hash",
        ),
        pytest.param(
            Rules(paused=False), Bounds(versions=(2, 0), servers=1),
            "mixed weights are served", "writes half of 2A",
            id="sample while weights are written",
        ),
        pytest.param(
            Rules(staleness=False), Bounds(versions=(3, 0), servers=1),
            "weights are served that are staler than allowed", "reads the head",
            id="serve whatever is held",
        ),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found_by_a_shortest_trace(
    rules: Rules, bounds: Bounds, promise: str, last: str
) -> None:
    result = explored(rules, bounds)
    assert result.broken == promise
    assert last in result.trace[-1], "\n".join(result.trace)
    assert explored(Rules(), bounds).broken is None, "the rule makes the difference"


def test_a_head_that_nobody_gives_back_leaves_servers_behind() -> None:
    bounds = Bounds(versions=(1, 0), redis_restarts=1, servers=1)
    result = explored(Rules(restore=False), bounds)
    assert result.stuck is not None
    assert result.trace[-1] == "redis restarts empty"
    assert explored(Rules(), bounds).stuck is None


def test_the_explorer_gives_the_shortest_trace_and_tells_what_is_stuck() -> None:
    """A counter to 5 that doubles, too, and may fall into a hole."""

    def steps(n: int) -> list[tuple[str, int]]:
        if n in (5, -1):
            return []
        return [("n adds", n + 1), ("n doubles", min(5, 2 * n)), ("n falls", -1)]

    def found(broken: int, falls_are_faults: bool) -> Explored[int]:
        return explore(
            0,
            steps,
            holds=lambda n: "it is here" if n == broken else None,
            grows=lambda before, after: None,
            goal=lambda n: n == 5,
            is_fault=lambda label: falls_are_faults and label == "n falls",
        )

    assert found(4, True).trace == ("n adds", "n adds", "n doubles")
    assert found(4, True).broken == "it is here"
    assert (found(9, True).stuck, found(9, True).trace) == (-1, ("n falls",))
    assert found(9, True).states == 7
