"""Checkpoints of whole runs: by time, few that stay, and a disk that is full when one is due.

Redis, loop, model, optimizer and disk are real; the server is a fake that makes trees up.
"""

import asyncio
import json
import os
import sys
import uuid
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_follower import FakeFollower
from faults.disks import Disk, disk
from faults.training import CONFIG
from support import Quiet

from tests.integration.test_async_training import settings_for as small_run
from trainer import train as loop
from trainer.config import TrainSettings

SOON = 1e-4
"""Minutes: after every step."""


@pytest.fixture
def run_name() -> str:
    return f"saving-{uuid.uuid4().hex[:8]}"


def settings_for(
    redis_url: str, run: str, model: Path, folder: Path, pause_s: float = 20.0, **trainer: Any
) -> TrainSettings:
    return small_run(
        redis_url, run, model,
        rollout={"questions": 2},
        trainer={"steps": 5} | trainer,
        fleet={"store": f"file://{folder / 'weights'}", "pause_s": pause_s},
    )  # fmt: skip


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


async def test_a_short_run_has_one_at_the_end_alone(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(redis_url, run_name, tiny_math, tmp_path, steps=3)
    async with FakeFollower(redis_url, run_name).running():
        summary = await loop.train(settings, tmp_path / "run", Quiet())
    assert names(tmp_path / "run") == ["step-000003"]
    assert summary.steps == 3


async def test_by_time_few_stay_and_a_run_that_ends_early_goes_on(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, tmp_path, checkpoint_minutes=SOON, keep_checkpoints=2
    )
    run = tmp_path / "run"

    class StopsAfterFour(Quiet):
        def step(self, done: int, total: int, values: dict[str, Any]) -> None:
            super().step(done, total, values)
            if done == 4:
                raise asyncio.CancelledError

    async with FakeFollower(redis_url, run_name).running():
        with pytest.raises(asyncio.CancelledError):
            await loop.train(settings, run, StopsAfterFour())
        assert names(run) == ["step-000002", "step-000003"]
        (run / "checkpoints" / "step-000001.partial").mkdir()  # a kill in the middle of a deletion
        await loop.train(settings, run, Quiet(), resume=True)
    assert steps_of(run) == [1, 2, 3, 4, 4, 5]
    assert names(run) == ["step-000004", "step-000005"]


async def test_an_old_one_that_cannot_be_deleted_ends_no_run(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, tmp_path, checkpoint_every=1, keep_checkpoints=1
    )
    replace, reporter = os.replace, Quiet()

    def refusing(source: Path, target: Path) -> None:
        if str(source).endswith("step-000001"):
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    async with FakeFollower(redis_url, run_name).running():
        await loop.train(settings, tmp_path / "run", reporter)
    assert names(tmp_path / "run") == ["step-000001", "step-000005"]
    told = [line for line in reporter.said if "an old checkpoint cannot be deleted" in line]
    assert len(told) == 4
    assert "busy" in told[0]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    """The disk of a run's checkpoints, full."""
    (tmp_path / "run").mkdir()
    with disk(tmp_path / "run" / "checkpoints", megabytes=24) as found:
        if not found.mounted:
            pytest.skip("only root may mount a small disk")
        found.fill(None)
        yield found


class Frees(Quiet):
    """Frees a disk once the run says that its last checkpoint waits."""

    def __init__(self, small: Disk) -> None:
        super().__init__()
        self.small = small

    def say(self, text: str) -> None:
        super().say(text)
        if "the last checkpoint waits" in text:
            self.small.free(None)


async def test_a_full_disk_during_a_run(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path, small: Disk
) -> None:
    settings = settings_for(
        redis_url, run_name, tiny_math, tmp_path, pause_s=5.0, checkpoint_every=2
    )
    run, reporter = tmp_path / "run", Frees(small)
    async with FakeFollower(redis_url, run_name).running():
        summary = await loop.train(settings, run, reporter)
    assert steps_of(run) == [1, 2, 3, 4, 5]
    assert names(run) == ["step-000005"]
    assert summary.measurements[-1].step == 5
    told = [line for line in reporter.said if "cannot be written" in line]
    assert [f"step-00000{step}" in line for step, line in zip((2, 4, 5), told, strict=True)] == [
        True
    ] * 3
    assert all(f"free some room in {run / 'checkpoints'}" in line for line in told)
    assert all("training goes on without this checkpoint" in line for line in told[:2])


async def spoke_train(
    redis_url: str, run: str, model: Path, folder: Path, run_dir: Path
) -> tuple[int | None, str, str]:
    """(exit code, output, errors) of a process that trains two steps."""
    config = folder / "train.toml"
    config.write_text(CONFIG.format(run=run, model=model, questions=2, steps=2, staleness=0))
    chosen = [
        f"fleet.redis_url={redis_url}", f"fleet.store=file://{folder / 'weights'}", "fleet.pause_s=1",
        'rollout.plan={kind="group", samples=4}', "algorithm.name=grpo", "algorithm.mask_threshold=none",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trainer.cli", "train", str(config), "--run-dir", str(run_dir),
        *(f"--set={one}" for one in chosen), stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    async with asyncio.timeout(90):
        said, errors = await process.communicate()
    return process.returncode, said.decode(), errors.decode()


async def test_a_disk_that_stays_full_ends_the_run_at_its_end_in_one_line(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path, small: Disk
) -> None:
    run = tmp_path / "run"
    async with FakeFollower(redis_url, run_name).running():
        code, said, errors = await spoke_train(redis_url, run_name, tiny_math, tmp_path, run)
    assert code == 2
    assert "step-000001 cannot be written" in said
    assert "the last checkpoint waits, at most 1 s" in said
    last = errors.splitlines()[-1]
    assert last.startswith(
        f"spoke train: {run / 'checkpoints' / 'step-000002'} cannot be written: No space left"
    )
    assert last.endswith("given up after 1 s; there is none")
    assert "Traceback" not in errors
    assert names(run) == []
    assert steps_of(run) == [1, 2]


async def test_a_run_folder_on_a_full_disk_is_one_line(
    redis_url: str, run_name: str, tiny_math: Path, tmp_path: Path, small: Disk
) -> None:
    run = small.folder / "another"  # a folder needs no room here, a file does
    code, _, errors = await spoke_train(redis_url, run_name, tiny_math, tmp_path, run)
    assert code == 2
    assert errors.splitlines()[-1].startswith("spoke train: No space left on device")
    assert "free some room" in errors
    assert "Traceback" not in errors
