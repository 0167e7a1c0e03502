"""The main job on real data: one SPO-tree step on real GSM8K questions through a real engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support import Quiet
from transformers import AutoModelForCausalLM

from shared.tree import FinishReason
from shared.wire import RolloutTreeResponse
from trainer import train as loop
from trainer.config import TrainSettings
from trainer.rollouts import Rollout, Sampling


def settings_for(following: Any, model: Path, gsm8k: Path, **trainer: Any) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "run": following.run,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": str(gsm8k / "train.jsonl"), "heldout": str(gsm8k / "test.jsonl")},
            "reward": {"name": "gsm8k"},
            "rollout": {
                "questions": 8,
                "plan": {"kind": "tree", "branch_factors": [3, 2], "segment_tokens": 16},
                "max_tokens": 64,
            },
            "trainer": {"steps": 1, "learning_rate": 1e-4, "warmup_steps": 0, "kl_coef": 1e-4}
            | trainer,
            "fleet": {
                "redis_url": following.redis_url,
                "store": following.store,
                "dtype": "float32",
                "wait_s": 60,
            },
            "evaluation": {"questions": 4, "samples": 2},
        }
    )


def check_trees(trees: list[RolloutTreeResponse], policy: Any) -> None:
    """Structure, rewards, and the logprobs of the last paths against a forward pass."""
    for tree in trees:
        for node in tree.nodes[1:]:
            assert len(node.token_ids) == len(node.logprobs) > 0
            assert len(tree.response_token_ids(node.id)) <= 64
        leaves = list(tree.leaves())
        assert all(
            leaf.reward == 0.0 for leaf in leaves if leaf.finish_reason is FinishReason.LENGTH
        )
        assert tree.nodes[0].value == pytest.approx(
            sum(v.value for v in tree.nodes if v.parent == 0) / len(tree.children[0])
        )
        leaf = leaves[-1]
        ids = tree.prompt_token_ids + tree.response_token_ids(leaf.id)
        with torch.no_grad():
            full = policy(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        begin = len(tree.prompt_token_ids)
        mine = full[range(begin - 1, len(ids) - 1), ids[begin:]].tolist()
        claimed = [lp for node in tree.path(leaf.id) for lp in node.logprobs]
        assert mine == pytest.approx(claimed, abs=1e-3)


@pytest.mark.slow
async def test_one_spo_tree_step_on_gsm8k(
    following: Any, tiny_math: Path, gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[RolloutTreeResponse] = []
    step_of = Sampling.step

    async def keeping(self: Sampling, step: int, version: int) -> Rollout:
        rollout = await step_of(self, step, version)
        # The tiny model answers no GSM8K question: leaves are told apart by their tokens, so that there is signal.
        kept.extend(rollout.trees)
        rollout.trees = [mark(tree) for tree in rollout.trees]
        return rollout

    def mark(tree: RolloutTreeResponse) -> RolloutTreeResponse:
        leaves = {leaf.id for leaf in tree.leaves()}
        nodes = [
            n.model_copy(update={"reward": float(sum(n.token_ids) % 2)}) if n.id in leaves else n
            for n in tree.nodes
        ]
        return tree.model_copy(update={"nodes": nodes}).with_values()

    monkeypatch.setattr(Sampling, "step", keeping)
    reporter = Quiet()
    settings = settings_for(following, tiny_math, gsm8k)
    summary = await loop.train(settings, tmp_path / "run", reporter)

    assert len(kept) == 8
    check_trees(kept, AutoModelForCausalLM.from_pretrained(tiny_math, dtype=torch.float32).eval())
    step = reporter.steps[0]
    assert step["trees"] == 8
    assert step["segments"] > 8
    assert step["mismatch"] < 1e-3
    assert step["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert step["gradient_norm"] > 0
    assert step["skipped"] == {}
    assert reporter.measured_labels == ["before", "after"]

    trained = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoints" / "step-000001", dtype=torch.float32
    ).eval()
    async with httpx.AsyncClient(base_url=following.url, timeout=60.0) as client:
        info = (await client.get("/info")).json()
        assert info["weights"]["version"] == step["version"] == max(summary.versions.values())
        answer = await client.post(
            "/rollout_tree",
            json={
                "prompt": "Ana has 12 apples.",
                "plan": {"kind": "group", "samples": 1},
                "sampling": {"max_tokens": 20, "seed": 1},
            },
        )
    tree = RolloutTreeResponse.model_validate_json(answer.content)
    ids = tree.prompt_token_ids + tree.nodes[1].token_ids
    with torch.no_grad():
        full = trained(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    begin = len(tree.prompt_token_ids)
    mine = full[range(begin - 1, len(ids) - 1), ids[begin:]].tolist()
    assert mine == pytest.approx(tree.nodes[1].logprobs, abs=1e-3)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1]
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 1000


@pytest.mark.slow
async def test_a_resumed_run_goes_on_where_it_stopped(
    transformers_server: Any, tiny_math: Path, gsm8k: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = settings_for(transformers_server, tiny_math, gsm8k, steps=3, checkpoint_every=1)

    class StopsAfterTwo(Quiet):
        def step(self, done: int, total: int, values: dict[str, Any]) -> None:
            super().step(done, total, values)
            if done == 2:
                raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await loop.train(settings, folder, StopsAfterTwo())
    reporter = Quiet()
    await loop.train(settings, folder, reporter, resume=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Step 2 had no checkpoint when the run stopped, so it is done again, under version numbers never used before.
    assert [line["step"] for line in lines] == [1, 2, 2, 3]
    versions = [line["version"] for line in lines]
    assert versions == sorted(set(versions))
