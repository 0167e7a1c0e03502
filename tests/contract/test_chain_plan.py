"""A chain plan on either engine: its own tokens, cut where the partition says, rolled out from its cache."""

import asyncio
import math
from pathlib import Path

import pytest

from server.branches import Branch, walk
from server.continuations import Continuations
from server.engines.base import Engine
from server.sampler import sample
from server.tokens import Tokens
from shared.tree import FinishReason, Role
from shared.wire import ChainPlan, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="session")

STORY = "Ben has 32 apples. He buys 15 more. How many apples does Ben have now?\n"
LIMIT, SAMPLES, ROLLOUTS = 60, 3, 2


async def grow(engine: Engine, model: Path) -> tuple[Branch, Continuations]:
    tokens = Tokens.load(str(model))
    continuations = Continuations(
        engine=engine,
        tokens=tokens,
        prompt=tuple(tokens.encode(STORY)),
        sampling=Sampling(temperature=1.3, max_tokens=LIMIT),
        seed=11,
    )
    partition = {"kind": "cutpoints", "threshold": 0.9, "interval": 1}
    plan = ChainPlan.model_validate(
        {"samples": SAMPLES, "partition": partition, "value_rollouts": ROLLOUTS}
    )
    return await asyncio.wait_for(sample(plan, continuations), 60), continuations


async def test_a_chain_is_cut_and_rolled_out(engine: Engine, tiny_math: Path):
    root, continuations = await grow(engine, tiny_math)
    segments = [place.branch for place in walk(root) if place.branch.role is Role.SEGMENT]
    assert len(segments) > 2 * SAMPLES
    for branch in segments:
        completion, rollouts = branch.completion, branch.children[:ROLLOUTS]
        unsure = [x < math.log(0.9) for x in completion.logprobs]
        assert not any(unsure[1:])
        assert unsure[0] or len(branch.before) == 0
        if branch.children:
            assert [child.role for child in branch.children[:-1]] == [Role.ROLLOUT] * ROLLOUTS
            assert completion.finish_reason is FinishReason.LENGTH
        for rollout in rollouts:
            assert rollout.before == branch.response
            assert rollout.response[: len(branch.response)] == branch.response
            ended = rollout.response[-1] in engine.info.eos_token_ids
            assert ended or len(rollout.response) == LIMIT
    unique = {place.branch for place in walk(root) if place.branch.completion is not None}
    counts = continuations.counts
    assert counts.sampled == sum(len(branch.completion.token_ids) for branch in unique)
    # The responses' prefixes were in the cache; vLLM keeps whole blocks of 32 tokens.
    assert counts.cached > counts.computed_prefill


async def test_the_same_seed_gives_the_same_chain(engine: Engine, tiny_math: Path):
    roots = [(await grow(engine, tiny_math))[0] for _ in range(2)]
    found = [[(p.parent, p.branch.role, p.branch.response) for p in walk(r)] for r in roots]
    assert found[0] == found[1]
