"""What a run leaves on disk: a model that anyone can load, and the state to go on from.

`checkpoints/step-000007` in a run's folder is whole. What is being written or deleted is `step-000007.partial`;
what a killed run left of that is deleted when the next one is written, and so is `step-000007.old.partial`, which
another checkpoint of the same step has replaced.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from shared.errors import CheckpointError, ConfigError
from shared.new_files import sync
from shared.receiving import FULL
from trainer.optimizer import PolicyOptimizer
from trainer.replay import Replay
from trainer.update import Learner

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
REPLAY = "replay.json"
CRITIC = "critic"
PARTIAL = ".partial"
_WHOLE = re.compile(r"step-(\d{6,})")
_WRITER = re.compile(r"PytorchStreamWriter|unexpected pos|file write failed")
"""torch's words for a file that it could not write."""
_SAYS_ERRNO = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands. Data order and seeds follow from the step alone."""

    step: int
    """Steps done."""
    version: int
    """Newest version that was published."""
    sampled_tokens: int
    seconds: float = 0.0
    """Spent on training; measurements and checkpoints not counted."""
    trees: dict[str, Any] = field(default_factory=dict)
    """The ledger's; see `Ledger.as_json`."""


def save(
    folder: Path, learner: Learner, source: str, replay: Replay | None, progress: Progress
) -> Path:
    """Write one checkpoint, whole or not at all.

    Args:
        folder: of the run; the checkpoint goes to `checkpoints/step-000007` below it.
        learner: its policy is the checkpoint; the optimizer's state and the critic go beside it.
        source: checkpoint that the run started from, for the tokenizer.
        replay: segments that wait; None without replay.
        progress: where the run stands.

    Returns:
        The checkpoint's folder, which is a Hugging Face checkpoint too.

    Raises:
        CheckpointError: the disk is full, or refuses; nothing of the checkpoint is left.
    """
    final = of(folder, progress.step)
    partial = final.with_name(final.name + PARTIAL)
    with _refusal(final, partial):
        for left in final.parent.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_room(folder)
        partial.mkdir()
        _write(partial, learner, source, replay, progress)
        for written in (partial, *partial.rglob("*")):
            sync(str(written))
        if final.exists():
            os.replace(final, final.with_name(f"{final.name}.old{PARTIAL}"))
        # By rename: a run that dies here leaves the checkpoint before this one as the newest.
        os.replace(partial, final)
    with contextlib.suppress(OSError):  # it is whole, and has its name
        sync(str(final.parent))
    return final


def of(folder: Path, step: int) -> Path:
    """Where a run's checkpoint of a step lies, if there is one."""
    return folder / "checkpoints" / f"step-{step:06d}"


def _write(
    partial: Path, learner: Learner, source: str, replay: Replay | None, progress: Progress
) -> None:
    learner.policy.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    _dump(learner.optimizer, partial / OPTIMIZER)
    if learner.critic is not None:
        learner.critic.model.save_pretrained(partial / CRITIC)
        _dump(learner.critic.optimizer, partial / CRITIC / OPTIMIZER)
    if replay is not None:
        (partial / REPLAY).write_text(replay.state())
    (partial / STATE).write_text(json.dumps(asdict(progress)))


def _dump(optimizer: PolicyOptimizer, path: Path) -> None:
    # Into a stream of ours: given a path, torch does not tell why it could not write.
    with path.open("wb") as stream:
        torch.save(optimizer.state_dict(), stream)


def _check_room(folder: Path) -> None:
    """Refuse where the newest one tells that there is too little: others would find the disk full meanwhile."""
    needed = sum(file.stat().st_size for last in whole(folder)[-1:] for file in last.rglob("*"))
    disk = shutil.disk_usage(folder / "checkpoints")
    # Some network file systems tell neither number.
    if disk.total and needed > disk.free:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)} ({needed / 1e6:,.0f} MB needed, {disk.free / 1e6:,.0f} MB free)",
        )


@contextlib.contextmanager
def _refusal(final: Path, partial: Path) -> Iterator[None]:
    """What the disk refuses, as one line; then nothing is left of what was written."""
    try:
        yield
    except (
        Exception
    ) as error:  # a disk's errors come as whatever the library that writes makes of them
        shutil.rmtree(partial, ignore_errors=True)
        number, reason = _reason(error)
        # safetensors has its own; torch's RuntimeErrors and tokenizers' bare Exceptions may be of anything.
        if not isinstance(error, OSError | SafetensorError) and (
            number is None and not _WRITER.search(reason)
        ):
            raise
        remedy = f"; free some room in {final.parent}" if number in FULL else ""
        raise CheckpointError(f"{final} cannot be written: {reason}{remedy}") from error


def _reason(error: BaseException) -> tuple[int | None, str]:
    """(errno, text) of what the disk said, however it was passed on."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            return link.errno, str(link.strerror)
        if said := _SAYS_ERRNO.search(str(link)):
            return int(said[1]), os.strerror(int(said[1]))
        link = link.__cause__ or link.__context__
    return None, (str(error) or type(error).__name__).splitlines()[0]


def thin(newest: Path, keep: int) -> list[str]:
    """Delete the checkpoints before a whole one; returns their names.

    Args:
        newest: as `save` returned it; it and later ones stay.
        keep: how many stay, `newest` among them; 0 is all.

    Raises:
        OSError: of the first that cannot be deleted; the others are.
    """
    found = whole(newest.parent.parent)
    older = found[: found.index(newest)] if keep else []
    surplus = older[: max(0, len(older) + 1 - keep)]
    refused: list[OSError] = []
    for path in surplus:
        doomed = path.with_name(path.name + PARTIAL)
        try:
            # By rename, too: one that is half deleted is nothing to go on from.
            os.replace(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return [path.name for path in surplus]


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    found = [
        path for path in (folder / "checkpoints").glob("step-*") if _WHOLE.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        ConfigError: there is none.
    """
    found = whole(folder)
    if not found:
        # A folder that has a run is refused without --resume.
        anew = (
            "with another --run-dir" if (folder / "metrics.jsonl").exists() else "without --resume"
        )
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint; start anew {anew} (trainer.checkpoint_minutes and "
            "trainer.checkpoint_every say how often one is made)"
        )
    return found[-1]


def restore(checkpoint: Path, learner: Learner, replay: Replay | None) -> Progress:
    """Load the states of optimizers and replay; the models are loaded from the folder itself.

    Raises:
        ConfigError: the checkpoint is of another model, or lacks what the settings need.
    """
    try:
        _load(learner.optimizer, checkpoint / OPTIMIZER)
        if learner.critic is not None:
            _load(learner.critic.optimizer, checkpoint / CRITIC / OPTIMIZER)
        if replay is not None:
            replay.restore((checkpoint / REPLAY).read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"--resume: {checkpoint} has no {Path(error.filename).name}; resume with the settings it was made with"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--resume: {checkpoint}: {error}") from None
    return Progress(**json.loads((checkpoint / STATE).read_text()))


def _load(optimizer: PolicyOptimizer, path: Path) -> None:
    optimizer.load_state_dict(torch.load(path, weights_only=True))
