"""Trees that came out smaller than their plan (`rollout.savings`), in the trainer.

1. A tree of whole responses in place of a tree, all of one reward, gives no segment: it is without signal,
   replaced by `rollout.resample`, and nothing of it trains or waits in replay.
2. A settled tree trains what the full tree trains, where the children that it lacks would have agreed.
3. An only child has no advantage, and what it stands for counts in its parent's.
4. A question counts once in `question_reward`, however few leaves it has.
5. Training asks with the run's savings; an evaluation never does.
"""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from fake_rollouts import Fake, FakeServer

from shared.tree import RolloutTree
from shared.wire import RolloutTreeRequest, RolloutTreeResponse, Savings
from tests.numerics import naive
from trainer import metrics
from trainer.algorithms import AlgorithmSettings, advantages
from trainer.config import load
from trainer.data import Draw, Question
from trainer.evaluate import evaluate
from trainer.fleet import Fleet, fixed
from trainer.packing import optimizer_batches, participating_tokens, rows
from trainer.replay import Replay
from trainer.rollouts import Rollout, Sampling, has_signal

ROOT = Path(__file__).resolve().parents[2]
KINDS = [AlgorithmSettings(advantage=kind) for kind in ("difference", "normalised", "unbiased")]
REST: dict[str, Any] = {
    "server_id": "s",
    "model": "m",
    "usage": {"prompt_tokens": 3, "sampled_tokens": 9, "computed_prefill_tokens": 3, "cached_tokens": 0},
    "weight_versions": {"min": 3, "max": 3},
    "timing": {"queue_s": 0, "sample_s": 0, "reward_s": 0},
}  # fmt: skip

PROBED = naive.make_tree([0] * 3, [4, 7, 5], [1.0] * 3, request_id="run/probed")
"""Three whole responses that agree, for the plan 4-2-2."""
SETTLED = naive.make_tree(
    [0, 1, 1, 0, 4, 4, 4], [3] * 7, [None, 1.0, 1.0, None, 1.0, 0.0, 0.0], request_id="run/settled"
)
"""Of 2-3 with two children first: node 1 is settled and lacks its third, node 4 has all."""
FULL = naive.make_tree(
    [0, 1, 1, 1, 0, 5, 5, 5], [3] * 8, [None, 1.0, 1.0, 1.0, None, 1.0, 0.0, 0.0]
)
"""The same with the child that was left out, which agrees."""


def answer(tree: RolloutTree) -> RolloutTreeResponse:
    return RolloutTreeResponse.model_validate(tree.model_dump() | REST)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.advantage)
def test_1_a_probed_tree_teaches_nothing(settings: AlgorithmSettings) -> None:
    assert advantages(PROBED, settings) == []
    assert not has_signal(answer(PROBED), settings)
    kept = advantages(PROBED, settings.model_copy(update={"drop_zero": False}))
    assert [segment.advantage for segment in kept] == [0.0] * 3
    fresh = advantages(PROBED, settings) + advantages(SETTLED, settings)
    replay = Replay(per_question=32, max_age=8, seed=0)
    replay.add(fresh, 0)
    assert {segment.tree.request_id for segment in replay.take(0)} == {"run/settled"}
    (batch,) = optimizer_batches(fresh, 4, random.Random(0))
    assert {segment.tree.request_id for segment in batch} == {"run/settled"}


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.advantage)
def test_2_a_settled_node_lacks_what_had_no_advantage(settings: AlgorithmSettings) -> None:
    settled = [s.advantage for s in advantages(SETTLED, settings)]
    assert settled == [s.advantage for s in advantages(FULL, settings)]
    # Nodes 1, 4 and the three below it: five segments, a row for each leaf and one for the settled node.
    assert [s.node_id for s in advantages(SETTLED, settings)] == [1, 4, 5, 6, 7]
    packed = rows(advantages(SETTLED, settings), mask_threshold=None)
    assert len(packed) == 4
    assert participating_tokens(packed) == 15
    twin = rows(advantages(FULL, settings), mask_threshold=None)
    assert [row.advantages.tolist() for row in packed] == [row.advantages.tolist() for row in twin]


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.advantage)
def test_3_an_only_child_has_no_advantage(settings: AlgorithmSettings) -> None:
    tree = naive.make_tree([0, 1, 0, 3, 3], [3] * 5, [None, 1.0, None, 1.0, 0.0])
    found = {s.node_id: s.advantage for s in advantages(tree, settings)}
    assert set(found) == {1, 3, 4, 5}
    assert found[1] == -found[3] > 0
    assert len(rows(advantages(tree, settings), mask_threshold=None)) == 3


def test_4_a_question_counts_once() -> None:
    trees = [answer(PROBED), answer(SETTLED)]
    measured = metrics.of_trees(trees)
    assert measured["question_reward"] == pytest.approx((1 + 3 / 5) / 2)
    assert measured["reward"]["mean"] == pytest.approx(6 / 8)
    segments = [s for tree in trees for s in advantages(tree, AlgorithmSettings())]
    assert metrics.of_segments(segments, trees)["dropped"] == {"no_tokens": 0, "no_advantage": 5}


def sampled(server: FakeServer, *overrides: str) -> Rollout:
    """A step of the quickstart's settings against a server."""
    chosen = ["rollout.questions=2", "rollout.resample=1", *overrides]
    settings = load(ROOT / "configs" / "quickstart.toml", chosen)
    questions = [Question(id=str(i), text=f"{i}?", reference="1") for i in range(3)]

    async def step() -> Rollout:
        fleet = Fleet(fixed(server.url), timeout_s=10)
        try:
            sampling = Sampling(
                settings=settings, fleet=fleet, draw=Draw(questions, 2, 0), session="s"
            )
            rollout = await sampling.step(0, 0)
            await evaluate(
                fleet, questions, data=settings.data, reward=settings.reward, samples=1,
                temperature=1.0, max_tokens=8, name="e", seed=0,
            )  # fmt: skip
        finally:
            await fleet.close()
        return rollout

    return asyncio.run(step())


def savings_of(server: FakeServer) -> list[Savings]:
    return [RolloutTreeRequest.model_validate(body).savings for body in server.bodies]


def test_1_5_training_asks_for_savings_and_replaces_what_was_probed(fake: Fake) -> None:
    probed, settled = (json.loads(answer(tree).model_dump_json()) for tree in (PROBED, SETTLED))
    server = fake(lambda i: probed if i == 0 else settled)
    rollout = sampled(server, "rollout.savings={probe=3, settle_after=2, branch_tokens=500}")
    assert [tree.request_id for tree in rollout.trees] == ["run/settled"] * 2
    assert [tree.request_id for tree in rollout.without_signal] == ["run/probed"]
    asked = Savings(probe=3, settle_after=2, branch_tokens=500)
    assert savings_of(server) == [asked] * 3 + [Savings()] * 3


def test_5_off_by_default(fake: Fake) -> None:
    server = fake(lambda _: json.loads(answer(SETTLED).model_dump_json()))
    sampled(server)
    assert savings_of(server) == [Savings()] * 5
