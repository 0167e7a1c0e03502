"""A tree that another attempt began, on either engine: what is given is not sampled again.

1. With a seed the tree comes out as if nothing had happened, wherever the first attempt was cut off.
2. What is sampled is what is missing, to the token.
3. Siblings that are missing here and there draw from their own streams.
4. Given nodes are told of like any other, parents first.
5. Where later children of a settled node are given, nothing is decided again.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from server.branches import Branch
from server.continuations import Continuations
from server.engines.base import Completion, Engine
from server.grading import Grading
from server.rewards.base import Grade
from server.sampler import sample
from server.tokens import Tokens
from shared.wire import GroupPlan, Plan, Reward, Sampling, Savings, TreePlan

pytestmark = pytest.mark.asyncio(loop_scope="session")

PLAN = TreePlan(branch_factors=[4, 3, 2], segment_tokens=15)
STORY = "Sam has 23 stones. He finds 19 more. He buys 7 more. How many stones does Sam have now?\n"
Nodes = dict[tuple[int, ...], Branch]


class FakeRewards:
    """Stands in for the pool: nothing is right."""

    async def grade(self, name: str, texts: Any, reference: str, options: Any) -> list[Grade]:
        return [Grade(reward=0.0) for _ in texts]


async def grow(
    engine: Engine,
    model: Path,
    plan: Plan = PLAN,
    given: Mapping[tuple[int, ...], Completion] | None = None,
    **savings: int,
) -> tuple[Nodes, Continuations]:
    """The nodes in the order in which they were told of, and what was sampled."""
    tokens, told, rewards = Tokens.load(str(model)), Nodes(), FakeRewards()
    continuations = Continuations(
        engine=engine,
        tokens=tokens,
        prompt=tuple(tokens.encode(STORY)),
        sampling=Sampling(temperature=1.0, max_tokens=80),
        seed=3,
    )
    work = sample(
        plan,
        continuations,
        savings=Savings(**savings),
        grading=Grading(tokens, rewards, Reward(name="fake")),  # type: ignore[arg-type]
        given=given,
        on_branch=told.__setitem__,
    )
    root = await asyncio.wait_for(work, 60)
    assert sum(1 for _ in below(root)) == len(told)
    return told, continuations


def below(root: Branch) -> Any:
    for child in root.children:
        yield child
        yield from below(child)


def first(told: Nodes, share: float) -> dict[tuple[int, ...], Completion]:
    """What an attempt had returned when it was cut off."""
    kept = list(told.items())[: int(share * len(told))]
    return {path: branch.completion for path, branch in kept if branch.completion}


def tokens_of(nodes: Nodes) -> dict[tuple[int, ...], list[int]]:
    return {path: branch.completion.token_ids for path, branch in nodes.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 1.0])
async def test_a_tree_goes_on_where_it_was_cut_off(engine: Engine, tiny_math: Path, share: float):
    whole, cost = await grow(engine, tiny_math)
    given = first(whole, share)
    resumed, rest = await grow(engine, tiny_math, given=given)
    assert tokens_of(resumed) == tokens_of(whole)
    had = sum(len(done.token_ids) for done in given.values())
    assert (rest.counts.given_nodes, rest.counts.given_tokens) == (len(given), had)
    assert rest.counts.sampled == cost.counts.sampled - had
    assert rest.counts.continuations == len(whole) - len(given)
    assert rest.counts.cost == cost.counts.cost
    places = {path: place for place, path in enumerate(resumed)}
    assert all(len(p) == 1 or places[p[:-1]] < places[p] for p in places)


@pytest.mark.parametrize("plan", [GroupPlan(samples=6), PLAN], ids=["group", "tree"])
async def test_missing_siblings_draw_from_their_own_streams(
    engine: Engine, tiny_math: Path, plan: Plan
):
    whole, _ = await grow(engine, tiny_math, plan)
    given = {p: b.completion for p, b in whole.items() if all(at in (1, 3) for at in p)}
    assert any(len(path) == 1 for path in given)
    resumed, _ = await grow(engine, tiny_math, plan, given)  # type: ignore[arg-type]
    assert tokens_of(resumed) == tokens_of(whole)


async def test_what_was_decided_is_not_decided_again(engine: Engine, tiny_math: Path):
    group = GroupPlan(samples=8)
    settled, _ = await grow(engine, tiny_math, group, settle_after=2)
    assert len(settled) == 2
    whole, _ = await grow(engine, tiny_math, group)
    given = {path: whole[path].completion for path in [(0,), (1,), (5,)]}
    resumed, _ = await grow(engine, tiny_math, group, given, settle_after=2)  # type: ignore[arg-type]
    assert tokens_of(resumed) == tokens_of(whole)
