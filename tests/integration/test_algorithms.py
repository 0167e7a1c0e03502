"""Every algorithm trains against a real server on the quickstart's problems, and goes on where it stopped."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Quiet, running_server

from trainer import train as loop
from trainer.config import TrainSettings, load
from trainer.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
COMPARE = sorted((ROOT / "configs" / "compare").glob("*.toml"))


@pytest.fixture(scope="module")
def server(redis_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("algorithms")
    follow = [
        "--redis-url",
        redis_url,
        "--run",
        "algorithms",
        "--engine",
        "transformers",
        "--dtype",
        "float32",
    ]
    model = ROOT / "configs" / "quickstart" / "warmstart"
    with running_server(model, folder / "server.log", *follow):
        yield redis_url


def settings_of(config: Path, redis_url: str, folder: Path, *overrides: str) -> TrainSettings:
    return load(
        config,
        [
            "run=algorithms", f"fleet.redis_url={redis_url}", f"fleet.store=file://{folder / 'weights'}",
            "rollout.questions=4", "trainer.steps=2", "trainer.updates_per_step=1", "trainer.warmup_steps=0",
            "evaluation.questions=4", "evaluation.samples=1", "evaluation.greedy=false", "evaluation.every=0",
            *overrides,
        ],
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("config", COMPARE, ids=lambda path: path.stem)
async def test_every_algorithm_of_the_comparison_trains(server, tmp_path, config):
    settings = settings_of(config, server, tmp_path)
    reporter = Quiet()
    await loop.train(settings, tmp_path / "run", reporter)
    first, second = lines(tmp_path / "run")
    for line in (first, second):
        assert line["segments"] > 0
        assert line["gradient_norm"] > 0
        assert line["skipped"] == {}
        # The trainer's model is the sampler's: before its update the logprobs agree.
        assert line["mismatch"] < 1e-3
        assert line["ratio"] == pytest.approx(1.0, abs=1e-3)
    masked = settings.algorithm.mask_threshold is not None
    assert (first["participating"] < 0.3) is masked
    start = load_policy(settings.model.path).state_dict()
    end = load_policy(tmp_path / "run" / "checkpoints" / "step-000002").state_dict()
    assert any(not torch.equal(start[name], end[name]) for name in start)
    if config.stem == "ppo":
        assert first["critic"]["loss"] > 0
        assert (
            tmp_path / "run" / "checkpoints" / "step-000002" / "critic" / "config.json"
        ).is_file()


class StopsAfter(Quiet):
    """Ends the run as Ctrl-C would, after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.last = steps

    def step(self, done, total, values):
        super().step(done, total, values)
        if done == self.last:
            raise asyncio.CancelledError


async def test_replay_waits_and_survives_a_resumption(server, tmp_path):
    config = ROOT / "configs" / "compare" / "spo-tree.toml"
    chosen = ["replay.enabled=true", "replay.per_question=3", "replay.max_age=2", "trainer.steps=4",
              "trainer.checkpoint_every=1"]  # fmt: skip
    settings = settings_of(config, server, tmp_path, *chosen)
    folder = tmp_path / "run"
    with pytest.raises(asyncio.CancelledError):
        await loop.train(settings, folder, StopsAfter(3))
    waiting = json.loads((folder / "checkpoints" / "step-000002" / "replay.json").read_text())
    left = sum(len(entry["advantages"]) for entry in waiting["waiting"])
    await loop.train(settings, folder, Quiet(), resume=True)
    done = lines(folder)
    assert [line["step"] for line in done] == [1, 2, 3, 3, 4]
    assert done[1]["replay"]["waiting"] == left > 0
    assert all(line["replay"]["trained"] <= 3 * 4 * 3 for line in done)
    for before, now in ((done[1], done[3]), (done[3], done[4])):
        grown = now["segments"] - now["replay"]["trained"]
        lost = now["replay"]["too_old"] - before["replay"]["too_old"]
        assert now["replay"]["waiting"] == before["replay"]["waiting"] + grown - lost


async def test_ppo_goes_on_with_its_critic(server, tmp_path):
    config = ROOT / "configs" / "compare" / "ppo.toml"
    settings = settings_of(
        config, server, tmp_path, "trainer.checkpoint_every=1", "critic.warmup=1"
    )
    folder = tmp_path / "run"
    with pytest.raises(asyncio.CancelledError):
        await loop.train(settings, folder, StopsAfter(2))
    await loop.train(settings, folder, Quiet(), resume=True)
    first, second, again = lines(folder)
    assert first["skipped"] == {"critic": 1}
    assert second["skipped"] == again["skipped"] == {}
    saved = torch.load(
        folder / "checkpoints" / "step-000002" / "critic" / "optimizer.pt", weights_only=True
    )
    assert saved["steps"] == 2


async def test_questions_without_signal_are_replaced_within_the_bound(server, tmp_path):
    """Two samples of an easy or a hard question are often the same: those trees teach nothing."""
    config = ROOT / "configs" / "compare" / "grpo.toml"
    chosen = [
        'rollout.plan={kind="group", samples=2}',
        "rollout.questions=8",
        "rollout.resample=12",
    ]
    settings = settings_of(config, server, tmp_path, *chosen)
    await loop.train(settings, tmp_path / "run", Quiet())
    replaced = 0
    for line in lines(tmp_path / "run"):
        # Every tree was sampled and is counted; at most 12 more than the questions of the step.
        assert 8 <= line["trees"] <= 20
        assert line["replaced_trees"] <= line["trees"]
        assert line["dropped"]["no_advantage"] == 0
        replaced += line["replaced_trees"]
    assert replaced > 0


async def test_a_budget_ends_a_run_and_its_points_are_measured(server, tmp_path):
    config = ROOT / "configs" / "compare" / "grpo.toml"
    chosen = ["trainer.steps=50", "trainer.budget_tokens=5000", "evaluation.points=2", "trainer.decay=linear",
              "trainer.floor=0.0"]  # fmt: skip
    settings = settings_of(config, server, tmp_path, *chosen)
    reporter = Quiet()
    summary = await loop.train(settings, tmp_path / "run", reporter)
    done = lines(tmp_path / "run")
    totals = [line["sampled_tokens_total"] for line in done]
    assert totals[-1] >= 5000
    assert all(total < 5000 for total in totals[:-1])
    assert len(done) < 50
    assert reporter.measured_labels == ["before", "during", "after"]
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [m["sampled_tokens"] for m in saved["measurements"]][-1] == totals[-1]
    assert saved["measurements"][1]["sampled_tokens"] >= 2500
    # The learning rate falls with the budget that is left.
    rates = [line["learning_rate"] for line in done]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < settings.trainer.learning_rate
    assert summary.steps == len(done)
