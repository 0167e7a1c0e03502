"""Checkpoints: whole or not at all, the newest alone, and a disk that is full or refuses costs one line.

1. `newest` takes nothing for a checkpoint that is half written or half deleted; the next `save` clears it away.
2. `thin` leaves so many, the one just made and all later ones among them, and what a user has renamed.
3. Wherever a disk gets full, in the model, tokenizer or optimizer: one line, nothing left, others untouched.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults.disks import Disk, disk

from shared.errors import CheckpointError
from trainer import checkpoints
from trainer.checkpoints import Progress, newest, restore, save, thin, whole
from trainer.optimizer import PolicyOptimizer
from trainer.policy import load_policy
from trainer.settings import TrainerSettings
from trainer.update import Learner

SETTINGS = TrainerSettings(steps=10, learning_rate=1e-3, warmup_steps=0, kl_coef=0.0)


@pytest.fixture(scope="module")
def learner(tiny_math: Path) -> Learner:
    """One that has taken a step, so that its optimizer has moments to write."""
    policy = load_policy(str(tiny_math))
    optimizer = PolicyOptimizer(policy, SETTINGS, total_steps=10)
    sum(parameter.square().sum() for parameter in policy.parameters()).backward()
    optimizer.step()
    return Learner(
        policy=policy, reference=None, optimizer=optimizer, settings=SETTINGS, temperature=1.0,
        mask_threshold=None, max_tokens=16,
    )  # fmt: skip


def at(step: int) -> Progress:
    return Progress(step=step, version=step, sampled_tokens=100 * step)


def made(folder: Path, *steps: int) -> list[Path]:
    """Folders that look like whole checkpoints."""
    paths = [folder / "checkpoints" / f"step-{step:06d}" for step in steps]
    for path in paths:
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"weights")
        (path / "state.json").write_text("{}")
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_saved_is_the_newest_and_restores(
    learner: Learner, tiny_math: Path, tmp_path: Path
) -> None:
    path = save(tmp_path, learner, str(tiny_math), None, at(7))
    assert newest(tmp_path) == path
    again = load_policy(str(path))
    for name, tensor in learner.policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert restore(path, learner, None) == at(7)


def test_the_newest_is_by_number_beyond_six_digits(tmp_path: Path) -> None:
    *_, last = made(tmp_path, 2, 999_999, 1_000_000)
    assert newest(tmp_path) == last


@pytest.mark.parametrize(
    ("keep", "stay"), [(0, [1, 2, 3, 5]), (1, [5]), (2, [3, 5]), (3, [2, 3, 5]), (9, [1, 2, 3, 5])]
)
def test_so_many_stay(tmp_path: Path, keep: int, stay: list[int]) -> None:
    *_, last, _ = made(tmp_path, 1, 2, 3, 5, 8)
    os.mkdir(last.with_name("step-000001-best"))  # as a user renames one that is to stay
    thin(last, keep)
    left = [f"step-{step:06d}" for step in (*stay, 8)]
    assert names(tmp_path) == sorted([*left, "step-000001-best"])


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(
    learner: Learner, tiny_math: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made(tmp_path, 1, 2)

    def killed(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            thin(second, 1)
    assert whole(tmp_path) == [second]
    assert names(tmp_path) == [first.name + ".partial", second.name]
    third = save(tmp_path, learner, str(tiny_math), None, at(3))
    assert names(tmp_path) == [second.name, third.name]


def test_a_kill_while_one_is_written_leaves_the_one_before(
    learner: Learner, tiny_math: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = made(tmp_path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, learner, str(tiny_math), None, at(2))
    assert newest(tmp_path) == before
    save(tmp_path, learner, str(tiny_math), None, at(3))
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_one_that_cannot_be_deleted_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, last = made(tmp_path, 1, 2, 3, 4)
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if source == first:
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(OSError, match="busy"):
        thin(last, 2)
    assert whole(tmp_path) == [first, third, last]
    assert not second.exists()


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a mistake"),
        RuntimeError("tensors on two devices"),
        torch.OutOfMemoryError("CUDA"),
    ],
)
def test_an_error_that_is_not_the_disks_stays_what_it_is(
    learner: Learner,
    tiny_math: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def mistaken(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", mistaken)
    with pytest.raises(type(error), match=str(error)):
        save(tmp_path, learner, str(tiny_math), None, at(1))
    assert names(tmp_path) == []


def test_a_file_system_that_syncs_no_folders_will_do(
    learner: Learner, tiny_math: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    made = save(tmp_path, learner, str(tiny_math), None, at(1))
    assert newest(tmp_path) == made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "disk", megabytes=24) as found:
        if not found.mounted:
            pytest.skip("only root may mount a small disk")
        yield found


def leave(small: Disk, room: int) -> None:
    """Fill the disk but for some bytes."""
    small.fill(None)
    ballast = small.folder / "ballast"
    os.truncate(ballast, ballast.stat().st_size - room)


@pytest.mark.parametrize("room", [0, 8 << 10, 1 << 20, 3276 << 10, 3300 << 10, 6 << 20])
@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
def test_a_full_disk(
    learner: Learner, tiny_math: Path, small: Disk, room: int, known: bool
) -> None:
    folder = small.folder / "run"
    before = [save(folder, learner, str(tiny_math), None, at(1))] if known else []
    folder.mkdir(exist_ok=True)
    leave(small, room)
    with pytest.raises(CheckpointError) as caught:
        save(folder, learner, str(tiny_math), None, at(2))
    said = str(caught.value)
    assert "\n" not in said
    assert "step-000002 cannot be written: No space left on device" in said
    assert f"free some room in {folder / 'checkpoints'}" in said
    assert ("MB needed" in said) == known
    assert whole(folder) == before
    assert not list(folder.rglob("*.partial"))
    small.free(None)
    path = save(folder, learner, str(tiny_math), None, at(2))
    assert newest(folder) == path
    assert checkpoints.restore(path, learner, None) == at(2)
