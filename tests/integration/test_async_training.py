"""The training loop, synchronous and ahead of itself, on a real Redis, store, model and optimizer.

The servers are fakes that make trees up from the request alone: what the loop does is then known bit for bit.
"""

import asyncio
import json
import random
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_follower import FakeFollower, made_up_tree
from support import Quiet, running_redis

from shared.errors import FleetError, WeightsError
from shared.wire import RolloutTreeResponse
from tests.numerics import naive
from trainer import metrics
from trainer import train as loop
from trainer.algorithms import Segment
from trainer.collection import Collector
from trainer.config import TrainSettings
from trainer.data import Draw
from trainer.packing import optimizer_batches
from trainer.policy import load_policy
from trainer.prepare import build_learner, off_policy_of, questions_of
from trainer.requests import tree_request
from trainer.rollouts import segments_of

QUESTIONS = 3


@pytest.fixture
def run_name() -> str:
    return f"async-{uuid.uuid4().hex[:8]}"


def settings_for(redis_url: str, run: str, model: Path, **sections: Any) -> TrainSettings:
    base: dict[str, Any] = {
        "run": run,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": "problems:train?seed=1&count=40",
            "heldout": "problems:heldout?seed=1&count=4",
        },
        "rollout": {
            "questions": QUESTIONS,
            "plan": {"kind": "group", "samples": 4},
            "max_tokens": 16,
            "timeout_s": 5.0,
        },
        "algorithm": {"name": "grpo", "mask_threshold": "none"},
        "trainer": {
            "steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "kl_coef": 0.0,
            "updates_per_step": 2,
            "decay": "constant",
        },
        "fleet": {"redis_url": redis_url, "dtype": "float32", "wait_s": 5, "pause_s": 20},
        "evaluation": {"questions": 2, "samples": 1, "greedy": False},
    }
    for name, section in sections.items():
        base[name] = base[name] | section
    return TrainSettings.model_validate(base)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = sorted((folder / "checkpoints").glob("step-??????"))[-1]
    return load_policy(checkpoint).state_dict()


def naive_run(settings: TrainSettings, session: str, steps: int) -> tuple[list[Any], Any]:
    """Synchronous training as it is written in the method: (requests in order, policy)."""
    learner = build_learner(settings, None)
    questions, _ = questions_of(settings)
    draw = Draw(questions, settings.rollout.questions, settings.seed)
    requests = []
    for step in range(steps):
        asked = [
            tree_request(
                question,
                data=settings.data,
                reward=settings.reward,
                plan=settings.rollout.plan,
                temperature=settings.rollout.temperature,
                max_tokens=settings.rollout.max_tokens,
                name=f"{settings.run}/{session}/step-{step}",
                seed=settings.seed * 1_000_003 + step,
                min_weight_version=step,
            ).model_dump(mode="json", exclude_none=True)
            for question in draw.step(step)
        ]
        requests += asked
        trees = [RolloutTreeResponse.model_validate(made_up_tree(r, step)) for r in asked]
        segments = [s for tree in trees for s in segments_of(tree, settings.algorithm)]
        rng = random.Random(f"{settings.seed}/{step}/0")
        for batch in optimizer_batches(segments, settings.trainer.updates_per_step, rng):
            learner.update(batch)
    return requests, learner.policy


async def test_without_staleness_requests_and_weights_are_those_of_the_naive_loop(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(redis_url, run_name, tiny_math)
    async with FakeFollower(redis_url, run_name).running() as server:
        await loop.train(settings, tmp_path / "run", Quiet())
    asked = [r for r in server.asked if "/step-" in r["request_id"]]
    session = asked[0]["request_id"].split("/")[1]
    expected, policy = naive_run(settings, session, 4)
    order = [request["request_id"] for request in expected]
    # Those of one step are sent side by side, and every step after the one before it.
    assert server.steps == [id_.split("/")[-2] for id_ in order]
    assert sorted(asked, key=lambda r: order.index(r["request_id"])) == expected
    theirs = policy.state_dict()
    ours = weights_of(tmp_path / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


async def test_rollouts_run_ahead_by_the_capacity_and_never_more(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 2}, trainer={"steps": 6}
    )
    reporter = Quiet()
    server = FakeFollower(redis_url, run_name)
    # Trees of step 0 wait until those of step 2 have come: an update is not what lets them go.
    server.may_answer = lambda r: "/step-0/" not in r["request_id"] or "step-2" in server.steps
    async with server.running():
        summary = await loop.train(settings, tmp_path / "run", reporter)
    assert sorted(server.steps) == sorted(f"step-{s}" for s in range(6) for _ in range(QUESTIONS))
    floors = {r["request_id"].split("/")[-2]: r["min_weight_version"] for r in server.asked}
    assert [floors[f"step-{s}"] for s in range(6)] == [0, 0, 0, 1, 2, 3]
    for done, line in enumerate(reporter.steps, start=1):
        # At the end of a step the next one is admitted: (t + n + 1) x questions, at most the run's own.
        assert line["ledger"]["asked"] == min(6, done + 3) * QUESTIONS
        assert line["ledger"]["trained"] == done * QUESTIONS
        assert line["staleness"]["max"] <= 2
        assert sum(line["staleness"]["shares"].values()) == pytest.approx(1.0)
    assert [line["staleness"]["max"] for line in reporter.steps[:3]] == [0, 1, 2]
    assert summary.trees.as_json() == {
        "asked": 18, "trained": 18, "in_flight": 0, "dropped": {},
    }  # fmt: skip
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["trees"]["asked"] == 18
    published = [report["version"] for line in reporter.steps for report in line["published"]]
    assert published == sorted(set(published))


async def test_no_tree_grows_while_nobody_counts_seconds(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    """Measured after each step; every tree takes a while, which counts as if it had been waited for at once."""
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 1},
        trainer={"steps": 4, "checkpoint_every": 2}, evaluation={"every": 1},
    )  # fmt: skip
    server, came, growing, beside = FakeFollower(redis_url, run_name), {}, set(), []
    tree_s = 0.4

    def answers(request: dict[str, Any]) -> bool:
        id_ = request["request_id"]
        if "/eval-" in id_:
            beside.append(len(growing))
            return True
        growing.add(id_)
        if time.monotonic() - came.setdefault(id_, time.monotonic()) < tree_s:
            return False
        growing.discard(id_)
        return True

    server.may_answer = answers
    async with server.running():
        summary = await loop.train(settings, tmp_path / "run", Quiet())
    assert len(beside) > 8
    assert set(beside) == {0}
    seconds = [measurement.seconds for measurement in summary.measurements]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    # Steps 1 and 2 are sampled side by side, and each of the others by itself.
    assert seconds[-1] > 3 * tree_s
    counted = sum(
        s for phase, s in summary.seconds.items() if phase not in ("measure", "checkpoint")
    )
    assert seconds[-1] == pytest.approx(counted, abs=0.05)


async def test_trees_older_than_allowed_are_dropped_and_counted(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(redis_url, run_name, tiny_math, fleet={"max_staleness": 1})
    server = FakeFollower(redis_url, run_name)
    reporter = Quiet()

    def one_lie(request: dict[str, Any]) -> bool:
        # From step 2 on, the second tree of a step is said to be older than it may be.
        server.lies = 2 * (len(server.asked) % QUESTIONS == 1 and "step-2" in server.steps)
        return True

    server.may_answer = one_lie
    async with server.running():
        summary = await loop.train(settings, tmp_path / "run", reporter)
    trees = summary.trees.as_json()
    assert trees["dropped"].keys() == {"too old"}
    assert trees["asked"] == trees["trained"] + trees["dropped"]["too old"] == 12
    assert trees["in_flight"] == 0
    counted = sum(line["dropped_trees"].get("too old", 0) for line in reporter.steps)
    assert counted == trees["dropped"]["too old"] > 0


async def test_a_step_without_a_usable_tree_ends_the_run_with_one_line(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(redis_url, run_name, tiny_math, fleet={"max_staleness": 1})
    server = FakeFollower(redis_url, run_name)
    server.lies = 1
    async with server.running():
        with pytest.raises(
            FleetError, match="every tree of step 1 has tokens of a version before 0"
        ):
            await loop.train(settings, tmp_path / "run", Quiet())


async def test_replacements_are_asked_for_ahead_too_and_add_up(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 1}, rollout={"resample": 3},
        trainer={"steps": 5},
    )  # fmt: skip
    async with FakeFollower(redis_url, run_name).running() as server:
        summary = await loop.train(settings, tmp_path / "run", Quiet())
    trees = summary.trees.as_json()
    assert trees["asked"] == len(server.steps) > 5 * QUESTIONS
    assert trees["asked"] == trees["trained"] + trees["dropped"]["no signal"]
    ids = [r["request_id"] for r in server.asked]
    assert len(set(ids)) == len(ids)


async def test_a_budget_ends_the_run_and_what_was_ahead_is_counted(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 2},
        trainer={"steps": 50, "budget_tokens": 60},
    )  # fmt: skip
    async with FakeFollower(redis_url, run_name).running():
        summary = await loop.train(settings, tmp_path / "run", Quiet())
    trees = summary.trees.as_json()
    assert summary.steps < 50
    assert trees["trained"] == summary.steps * QUESTIONS
    assert trees["dropped"] == {"unused at the end": trees["asked"] - trees["trained"]}
    assert trees["in_flight"] == 0


async def test_a_resumed_run_trains_no_tree_twice_and_counts_what_was_lost(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 1},
        trainer={"steps": 5, "checkpoint_every": 2},
    )  # fmt: skip

    class StopsAfterThree(Quiet):
        def step(self, done: int, total: int, values: dict[str, Any]) -> None:
            super().step(done, total, values)
            if done == 3:
                raise asyncio.CancelledError

    folder = tmp_path / "run"
    async with FakeFollower(redis_url, run_name).running() as server:
        with pytest.raises(asyncio.CancelledError):
            await loop.train(settings, folder, StopsAfterThree())
        summary = await loop.train(settings, folder, Quiet(), resume=True)
    # Step 3 was done after the newest checkpoint, so it is done again.
    assert [line["step"] for line in lines_of(folder)] == [1, 2, 3, 3, 4, 5]
    versions = [line["version"] for line in lines_of(folder)]
    assert versions == sorted(set(versions))
    sessions = {r["request_id"].split("/")[1] for r in server.asked}
    assert len(sessions) == 2
    questions = {
        r["request_id"].partition("/step-")[2]: r["prompt"]
        for r in server.asked
        if "/step-" in r["request_id"]
    }
    draw = Draw(questions_of(settings)[0], QUESTIONS, settings.seed)
    wanted = {
        f"{s}/{q.id}": settings.data.prompt.replace("{question}", q.text)
        for s in range(5)
        for q in draw.step(s)
    }
    assert questions == wanted  # the order of the data is that of a run which never stopped
    trees = summary.trees.as_json()
    assert trees["trained"] == 5 * QUESTIONS
    assert trees["dropped"] == {
        "trained after the checkpoint": QUESTIONS,
        "in flight when the run stopped": 2 * QUESTIONS,
    }
    assert trees["asked"] == trees["trained"] + sum(trees["dropped"].values())


@pytest.mark.parametrize("staleness", [0, 1])
async def test_trees_that_were_in_flight_at_a_kill_are_counted(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path, staleness: int
) -> None:
    """Asked for after the last line of metrics, replacements too; a kill writes nothing."""
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": staleness},
        trainer={"steps": 8, "checkpoint_every": 1}, rollout={"resample": 3, "timeout_s": 20.0},
    )  # fmt: skip
    folder, server, held = tmp_path / "run", FakeFollower(redis_url, run_name), []

    def answers(request: dict[str, Any]) -> bool:
        step = request["request_id"].split("/")[-2]
        replacement = server.steps.count(step) > QUESTIONS and step not in ("step-0", "step-1")
        if replacement and not held:
            held.append(request["request_id"])
        return request["request_id"] not in held

    server.may_answer = answers
    async with server.running():
        training = asyncio.create_task(loop.train(settings, folder, Quiet()))
        await server.until(lambda: bool(held) and lines_of(folder)[-1]["step"] > 1)
        written = (folder / "ledger.json").read_bytes()
        asked_at_last_line = lines_of(folder)[-1]["ledger"]["asked"]
        asked = json.loads(written)["asked"]
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
        stopped = json.loads((folder / "ledger.json").read_text())
        (folder / "ledger.json").write_bytes(written)  # as a kill would have left it
        held[:] = ["none"]
        summary = await loop.train(settings, folder, Quiet(), resume=True)
    # Running ahead, the replacement may have been asked for before the last line was written.
    assert asked >= asked_at_last_line + (0 if staleness else 1)
    assert stopped["in_flight"] == 0 < stopped["dropped"]["in flight when the run stopped"]
    trees = summary.trees.as_json()
    assert trees["asked"] == trees["trained"] + sum(trees["dropped"].values())
    assert trees["asked"] >= len(server.steps)
    assert trees["in_flight"] == 0
    if not staleness:  # there every tree that is asked for is sent at once
        assert trees["asked"] == len(server.steps)


async def test_below_min_servers_the_run_pauses_and_goes_on(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    """The only server dies with trees in flight; another one comes, and the run ends as if nothing had been."""
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 1}, rollout={"timeout_s": 1.0}
    )
    reporter = Quiet()
    first = FakeFollower(redis_url, run_name, "first")
    first.may_answer = lambda r: "/step-1/" not in r["request_id"]
    async with first.running():
        training = asyncio.create_task(loop.train(settings, tmp_path / "run", reporter))
        await first.until(lambda: "step-1" in first.steps)
    async with asyncio.timeout(15):
        while not any("0 of 1 servers serve" in line for line in reporter.said):
            await asyncio.sleep(0.02)
    assert not training.done()
    async with FakeFollower(redis_url, run_name, "second").running():
        summary = await asyncio.wait_for(training, 30)
    assert any("going on" in line for line in reporter.said)
    assert summary.trees.trained == 4 * QUESTIONS
    assert summary.trees.in_flight == 0
    assert summary.versions["second"] == summary.steps


async def test_a_pause_has_a_bound(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"pause_s": 0.5}, rollout={"timeout_s": 0.5}
    )
    first = FakeFollower(redis_url, run_name)
    first.may_answer = lambda r: "/step-1/" not in r["request_id"]
    async with first.running():
        training = asyncio.create_task(loop.train(settings, tmp_path / "run", Quiet()))
        await first.until(lambda: "step-1" in first.steps)
    with pytest.raises(FleetError, match="0 of 1 servers serve after a pause of 0 s"):
        await asyncio.wait_for(training, 30)


async def test_redis_may_go_and_come_back_empty(
    run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    """Trees go to the servers known before, publishing waits, and nothing is lost."""
    with running_redis() as redis:
        settings = settings_for(
            redis.url, run_name, tiny_math, fleet={"max_staleness": 1}, trainer={"steps": 6}
        )
        reporter = Quiet()
        server = FakeFollower(redis.url, run_name)
        gone = False

        def answers(request: dict[str, Any]) -> bool:
            nonlocal gone
            if not gone and "/step-2/" in request["request_id"]:
                gone = True
                redis.kill()
            return True

        server.may_answer = answers
        async with server.running():
            training = asyncio.create_task(loop.train(settings, tmp_path / "run", reporter))
            # The step whose trees were in flight trains without Redis; the next one's version cannot be announced.
            async with asyncio.timeout(30):
                while not any("waits" in line for line in reporter.said):
                    await asyncio.sleep(0.02)
            assert not training.done()
            assert server.steps.count("step-2") == QUESTIONS
            redis.start()
            summary = await asyncio.wait_for(training, 60)
    assert summary.trees.as_json() == {
        "asked": 18, "trained": 18, "in_flight": 0, "dropped": {},
    }  # fmt: skip
    assert summary.versions["fake"] == 6


async def test_a_tree_that_no_server_gives_is_lost_and_counted(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(redis_url, run_name, tiny_math, rollout={"timeout_s": 0.4})
    server = FakeFollower(redis_url, run_name)
    stuck: set[str] = set()

    def answers(request: dict[str, Any]) -> bool:
        if "/step-1/" in request["request_id"] and not stuck:
            stuck.add(request["request_id"])
        return request["request_id"] not in stuck

    server.may_answer = answers
    async with server.running():
        summary = await loop.train(settings, tmp_path / "run", Quiet())
    assert summary.trees.as_json() == {
        "asked": 12, "trained": 11, "in_flight": 0, "dropped": {"no server gave it": 1},
    }  # fmt: skip
    assert [r["request_id"] for r in server.asked].count(*stuck) == 2  # asked for once more


async def test_a_version_that_cannot_be_stored_ends_the_run_with_that_reason(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 1}, trainer={"steps": 6}
    )
    folder = tmp_path / "run"

    class InTheWay(Quiet):
        def step(self, done: int, total: int, values: dict[str, Any]) -> None:
            super().step(done, total, values)
            if done == 2:  # version 3 is there already, and is not ours
                taken = folder / "weights" / run_name / "v000003"
                taken.mkdir(parents=True)
                (taken / "manifest.json").write_text("{}")

    async with FakeFollower(redis_url, run_name).running():
        with pytest.raises(WeightsError, match="version 3"):
            await asyncio.wait_for(loop.train(settings, folder, InTheWay()), 60)


async def test_servers_that_never_follow_end_the_run_within_the_bound(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    """Step 2 may not be sampled before the fleet holds version 1: the run waits, says why, and stops."""
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": 1, "wait_s": 0.5}
    )
    server = FakeFollower(redis_url, run_name)

    def answers(request: dict[str, Any]) -> bool:
        server.follows = "/step-" not in request["request_id"]
        return True

    server.may_answer = answers
    async with server.running():
        with pytest.raises(FleetError, match="version 1: 0 of at least 1 servers hold it"):
            await asyncio.wait_for(loop.train(settings, tmp_path / "run", Quiet()), 60)
    assert set(server.steps) == {"step-0", "step-1"}


@pytest.mark.parametrize("staleness", [0, 1])
async def test_collecting_old_versions_holds_up_no_step(
    redis_url: str,
    run_name: str,
    tiny_math: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    staleness: int,
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, fleet={"max_staleness": staleness, "keep_versions": 1}
    )
    begun: list[int] = []
    trained = asyncio.Event()

    async def collect(self: Collector, newest: int) -> None:
        begun.append(newest)
        if len(begun) == 1:
            raise ValueError("of no kind that is foreseen")
        await trained.wait()

    class TellsTheEnd(Quiet):
        def measured(self, label: str, measurement: Any) -> None:
            if label == "after":
                trained.set()

    monkeypatch.setattr(Collector, "collect", collect)
    reporter = TellsTheEnd()
    async with FakeFollower(redis_url, run_name).running():
        summary = await asyncio.wait_for(loop.train(settings, tmp_path / "run", reporter), 60)
    assert summary.steps == 4
    assert begun[0] == 0
    assert len(begun) == 2, "one at a time"
    assert any("old versions stay: ValueError" in line for line in reporter.said)


def test_the_correction_is_of_asynchronous_training_alone(tiny_math: Path) -> None:
    def found(staleness: int, correction: str) -> str | None:
        settings = settings_for(
            "redis://r", "r", tiny_math, fleet={"max_staleness": staleness},
            trainer={"correction": correction},
        )  # fmt: skip
        off_policy = off_policy_of(settings)
        return off_policy and off_policy.correction

    assert [found(0, "truncated"), found(1, "none")] == [None, None]
    assert [found(1, "truncated"), found(3, "masked")] == ["truncated", "masked"]


def test_staleness_counts_the_tokens_that_train() -> None:
    tree = naive.make_tree([0, 0], [4, 2], [1.0, 0.0])
    first = tree.nodes[1].model_copy(update={"versions": [(5, 1), (6, 3)]})
    tree = tree.model_copy(update={"nodes": [tree.nodes[0], first, tree.nodes[2]]})
    segments = [Segment(tree=tree, node_id=1, advantage=0.5)]
    found = metrics.of_staleness(segments, 7)["staleness"]
    assert found == {"mean": 1.25, "max": 2, "shares": {"1": 0.75, "2": 0.25}}
    assert metrics.of_staleness([], 7)["staleness"] == {"mean": 0.0, "max": 0, "shares": {}}
