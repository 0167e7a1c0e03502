"""A tree plan on either engine: what it costs, and early decisions.

1. Apart from the prompt once, at most one block of the cache is computed for each continuation.
2. `align` moves the ends of segments, by at most half a block, to where a branch computes a single token.
3. `settle_after`: children are left out only where all leaves of the first ones agree; the others are the full
   tree's.
4. `probe`: whole responses that agree are the tree; if they do not, the tree is the one without a probe.
5. `branch_tokens`: branching ends, no response does; what is asked for counts.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.branches import Branch, walk
from server.continuations import Continuations
from server.engines.base import Engine
from server.grading import Grading
from server.rewards.base import Grade
from server.sampler import sample
from server.tokens import Tokens
from shared.tree import FinishReason
from shared.wire import GroupPlan, Plan, Reward, Sampling, Savings, TreePlan

pytestmark = pytest.mark.asyncio(loop_scope="session")

FACTORS, LIMIT = [4, 3, 2], 110
PLAN = TreePlan(branch_factors=FACTORS, segment_tokens=20)
STORY = (
    "Sam has 23 stones. He finds 19 more. He buys 7 more. He sells 16 of them. He loses 18. He buys as many "
    "again. How many stones does Sam have now?\n"
)


class FakeRewards:
    """Stands in for the pool: right is what ends with one of some characters."""

    def __init__(self, right: str) -> None:
        self.right = right

    async def grade(self, name: str, texts: Any, reference: str, options: Any) -> list[Grade]:
        return [Grade(reward=float(text.rstrip()[-1] in self.right)) for text in texts]


class Grown:
    """A tree, and what it cost."""

    def __init__(self, root: Branch, continuations: Continuations, grading: Grading) -> None:
        self.root, self.prompt = root, continuations.prompt
        self.counts, self.grades = continuations.counts, grading.grades

    def branches(self) -> dict[tuple[int, ...], Branch]:
        """By path of sibling positions."""
        found: dict[tuple[int, ...], Branch] = {(): self.root}
        waiting = [((), self.root)]
        while waiting:
            path, node = waiting.pop()
            for at, child in enumerate(node.children):
                found[*path, at] = child
                waiting.append(((*path, at), child))
        return found

    def rewards(self, node: Branch) -> set[float | None]:
        """Of all leaves below a node."""
        leaves = [p.branch for p in walk(node) if not p.branch.children]
        return {self.grades[leaf].reward for leaf in leaves}


async def grow(
    engine: Engine,
    model: Path,
    plan: Plan = PLAN,
    *,
    seed: int = 3,
    story: str = STORY,
    right: str = "02468",
    temperature: float = 1.0,
    **savings: int,
) -> Grown:
    tokens = Tokens.load(str(model))
    continuations = Continuations(
        engine=engine,
        tokens=tokens,
        prompt=tuple(tokens.encode(story)),
        sampling=Sampling(temperature=temperature, max_tokens=LIMIT),
        seed=seed,
    )
    rewards: Any = FakeRewards(right)
    grading = Grading(tokens, rewards, Reward(name="fake"))
    work = sample(plan, continuations, savings=Savings(**savings), grading=grading)
    root = await asyncio.wait_for(work, 60)
    await grading.below(root)
    return Grown(root, continuations, grading)


async def test_a_branch_computes_at_most_one_block(engine: Engine, tiny_math: Path):
    # A story that no other test has: the cache knows nothing of it.
    grown = await grow(engine, tiny_math, story="Zoe has 7 stones. " + STORY, seed=1)
    branches = grown.counts.continuations
    assert branches == len(grown.branches()) - 1 > 20
    block, prompt = engine.info.block_tokens, len(grown.prompt)
    assert prompt <= grown.counts.computed_prefill <= prompt + block * branches
    in_all = grown.counts.computed_prefill + grown.counts.cached
    asked = sum(prompt + len(b.before) for path, b in grown.branches().items() if path)
    assert in_all == asked


async def test_aligned_branches_compute_one_token(engine: Engine, tiny_math: Path):
    plan = TreePlan(branch_factors=FACTORS, segment_tokens=40, align=True)
    grown = await grow(engine, tiny_math, plan, story="Max has 8 stones. " + STORY, seed=2)
    block = engine.info.block_tokens
    lengths = set()
    for path, branch in grown.branches().items():
        if 0 < len(path) < 3 and branch.completion.finish_reason is FinishReason.LENGTH:
            assert (len(grown.prompt) + len(branch.response) - 1) % block == 0
            lengths.add(len(branch.completion.token_ids))
    assert lengths
    assert 40 - block // 2 <= min(lengths) <= max(lengths) <= 40 + block // 2
    below = grown.counts.continuations - FACTORS[0]
    first = len(grown.prompt) + (FACTORS[0] - 1) * block
    assert grown.counts.computed_prefill <= first + below


async def test_a_settled_node_has_leaves_that_agree(engine: Engine, tiny_math: Path):
    settled = decisions = 0
    for seed in range(4):
        full = (await grow(engine, tiny_math, seed=seed)).branches()
        saved = await grow(engine, tiny_math, seed=seed, settle_after=2)
        decisions += saved.counts.decisions
        for path, branch in saved.branches().items():
            assert branch.response == full[path].response
            if len(branch.children) < len(full[path].children):
                assert len(branch.children) == 2
                assert len(saved.rewards(branch)) == 1
                settled += 1
    assert settled == decisions > 0


async def test_a_group_settles_too(engine: Engine, tiny_math: Path):
    group = GroupPlan(samples=16)
    nobody = await grow(engine, tiny_math, group, right="?", settle_after=4)
    assert len(nobody.root.children) == 4
    mixed = await grow(engine, tiny_math, group, settle_after=4)
    assert len(mixed.rewards(mixed.root)) == 2
    assert len(mixed.root.children) == 16


async def test_a_probe_that_agrees_is_the_tree(engine: Engine, tiny_math: Path):
    agreed = await grow(engine, tiny_math, right="?", probe=3)
    assert len(agreed.branches()) == 1 + 3
    assert agreed.counts.decisions == 1
    assert all(not child.children for child in agreed.root.children)


async def test_a_probe_that_does_not_agree_changes_nothing(engine: Engine, tiny_math: Path):
    without = await grow(engine, tiny_math)
    probed = await grow(engine, tiny_math, probe=12)
    found = [{p: b.response for p, b in g.branches().items()} for g in (without, probed)]
    assert found[0] == found[1]
    assert probed.counts.sampled > without.counts.sampled
    assert probed.counts.decisions == 0


async def test_beyond_its_tokens_a_tree_branches_no_more(engine: Engine, tiny_math: Path):
    full = await grow(engine, tiny_math)
    saved = await grow(engine, tiny_math, branch_tokens=100)
    assert saved.counts.sampled < full.counts.sampled
    for path, branch in saved.branches().items():
        if not branch.children:
            ended = branch.completion.finish_reason is FinishReason.STOP
            assert ended or len(branch.response) == LIMIT  # no response is cut for it
        else:
            assert len(branch.children) in (1, FACTORS[len(path)])
    assert any(len(b.children) == 1 for b in saved.branches().values())


async def test_a_tree_branches_as_far_as_its_tokens_go(engine: Engine, tiny_math: Path):
    """What is asked for counts, or nodes that end together would all branch, or none."""
    planned = 4 * 20 + 12 * 20 + 24 * 20
    widths = []
    for budget in (planned // 2, planned * 3 // 4, planned):
        saved = (await grow(engine, tiny_math, branch_tokens=budget)).branches()
        at_last_depth = [b for path, b in saved.items() if len(path) == 2 and b.children]
        widths.append(sum(len(b.children) == 2 for b in at_last_depth))
        assert len(saved[()].children) == 4
    assert 0 <= widths[0] < widths[1] < widths[2]
    assert widths[1] < len(at_last_depth)
