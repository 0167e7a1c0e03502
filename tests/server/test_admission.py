"""Admission, in numbers.

1. Trees are let in while nodes and tokens fit; as much again waits in line, in order; the rest are 429.
2. A tree larger than the capacity is let in alone. A place is free again however its tree ends.
3. Who waits too long is 429; who goes away while waiting leaves no trace.
4. A tree is charged by what trees of its kind came to of late.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from server.admission import Gate
from server.costs import Cost, expected, most
from shared.errors import BusyError
from shared.wire import (
    ChainPlan,
    CutpointsPartition,
    FixedPartition,
    GroupPlan,
    TreePlan,
    WholePartition,
)


def cost(nodes: int, tokens: int = 0) -> Cost:
    return Cost(nodes=nodes, tokens=tokens)


@asynccontextmanager
async def held(gate: Gate, *costs: Cost) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for one in costs:
            await stack.enter_async_context(gate.admitted(one))
        yield


async def enter(gate: Gate, order: list[str], name: str, one: Cost) -> None:
    async with gate.admitted(one):
        order.append(name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_line_is_as_long_as_the_capacity_and_then_it_is_429() -> None:
    gate, order = Gate(cost(10, 1000)), list[str]()
    async with held(gate, cost(6), cost(4)):
        waiting = [asyncio.create_task(enter(gate, order, n, cost(5))) for n in "ab"]
        await settle()
        assert (gate.trees, gate.nodes, gate.waiting, order) == (2, 10, 2, [])
        with pytest.raises(BusyError) as refused:
            await enter(gate, order, "c", cost(1))
        assert refused.value.status == 429
        assert refused.value.retry_after_s >= 1
    await asyncio.gather(*waiting)
    assert order == ["a", "b"]
    assert (gate.trees, gate.nodes, gate.tokens, gate.waiting) == (0, 0, 0, 0)


async def test_a_small_tree_does_not_overtake_a_large_one() -> None:
    gate, order = Gate(cost(10, 1000)), list[str]()
    async with held(gate, cost(6)):
        large = asyncio.create_task(enter(gate, order, "large", cost(8)))
        await settle()
        small = asyncio.create_task(enter(gate, order, "small", cost(1)))
        await settle()
        assert order == []
    await asyncio.gather(large, small)
    assert order == ["large", "small"]


async def test_a_tree_over_the_capacity_is_let_in_alone() -> None:
    gate, order = Gate(cost(10, 100)), list[str]()
    async with held(gate, cost(500, 5000)):
        other = asyncio.create_task(enter(gate, order, "other", cost(1, 1)))
        await settle()
        assert order == []
    await other


async def test_a_place_is_free_again_however_its_tree_ends() -> None:
    gate = Gate(cost(10, 1000))
    with pytest.raises(ZeroDivisionError):
        async with gate.admitted(cost(10)):
            1 / 0  # noqa: B018
    async with held(gate, cost(10)):
        assert gate.nodes == 10


async def test_who_waits_too_long_is_429_and_who_leaves_leaves_no_trace() -> None:
    gate, order = Gate(cost(10, 1000), wait_s=0.05), list[str]()
    async with held(gate, cost(10)):
        leaving = asyncio.create_task(enter(gate, order, "leaving", cost(8)))
        await settle()
        behind = asyncio.create_task(enter(gate, order, "behind", cost(2)))
        await settle()
        leaving.cancel()
        with pytest.raises(BusyError, match=r"no place within"):
            await behind
        assert gate.waiting == 0
    assert (gate.trees, gate.nodes) == (0, 0)


async def test_who_leaves_makes_way_for_whoever_stands_behind() -> None:
    gate, order = Gate(cost(10, 1000)), list[str]()
    async with held(gate, cost(6)):
        large = asyncio.create_task(enter(gate, order, "large", cost(6)))
        await settle()
        small = asyncio.create_task(enter(gate, order, "small", cost(4)))
        await settle()
        large.cancel()
        await asyncio.wait_for(small, 5)
        assert order == ["small"]


async def test_a_tree_is_charged_by_what_its_kind_came_to() -> None:
    gate = Gate(cost(1000, 1000))
    for _ in range(100):
        async with gate.admitted(cost(1, 1000), "short") as place:
            assert place.came_to is None
            place.came_to = cost(1, 100)
        async with gate.admitted(cost(10, 100), "bushy") as place:
            place.came_to = cost(300, 100)
    # A tenth of what plans allow: nine such trees fit where one did.
    async with AsyncExitStack() as stack:
        for _ in range(9):
            await stack.enter_async_context(gate.admitted(cost(1, 1000), "short"))
        assert gate.trees == 9
        assert gate.tokens < 1000
    # Thirty times what could be expected, as a chain's rollouts may be.
    async with gate.admitted(cost(10, 100), "bushy"):
        assert 250 < gate.nodes <= 300
    # Another kind has taught nothing of this one.
    async with gate.admitted(cost(10, 100), "new"):
        assert (gate.nodes, gate.tokens) == (10, 100)


async def test_a_prompt_takes_its_own_tokens() -> None:
    gate = Gate(cost(100, 1000))
    async with gate.admitted(cost(1, 16), "group", 900):
        assert gate.tokens == 916
    assert gate.tokens == 0


def test_what_plans_can_come_to() -> None:
    tree = TreePlan(branch_factors=[6, 6, 6], segment_tokens=30)
    assert most(tree, 1000) == cost(6 + 36 + 216, 36 * 30 + 6 * 30 + 216 * 940)
    assert most(tree, 40) == cost(6 + 36, 6 * 30 + 36 * 10)
    # Segments of 15 to 45 tokens: more levels, and more of each.
    aligned = tree.model_copy(update={"align": True})
    assert most(aligned, 40) == cost(6 + 36 + 216, 6 * 40 + 36 * 25 + 216 * 10)
    assert most(GroupPlan(samples=8), 100) == cost(8, 800)
    fixed = ChainPlan(samples=2, partition=FixedPartition(tokens=40), value_rollouts=3)
    assert most(fixed, 100) == cost(2 + 6 * 3, 200 + 6 * (100 + 60 + 20))
    whole = ChainPlan(samples=2, partition=WholePartition(), value_rollouts=3)
    assert most(whole, 100) == cost(2 + 6, 200 + 600)
    assert expected(whole, 100) == expected(fixed, 100) == cost(8, 800)
    assert expected(tree, 40) == most(tree, 40)
    by_chance = ChainPlan(samples=2, partition=CutpointsPartition(), value_rollouts=3)
    assert most(by_chance, 100) == cost(2, 200)
