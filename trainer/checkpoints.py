"""What a run leaves on disk: a model that anyone can load, and the state to go on from."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from shared.errors import ConfigError
from trainer.optimizer import PolicyOptimizer
from trainer.replay import Replay
from trainer.update import Learner

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
REPLAY = "replay.json"
CRITIC = "critic"


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
    """
    final = folder / "checkpoints" / f"step-{progress.step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    learner.policy.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    torch.save(learner.optimizer.state_dict(), partial / OPTIMIZER)
    if learner.critic is not None:
        learner.critic.model.save_pretrained(partial / CRITIC)
        torch.save(learner.critic.optimizer.state_dict(), partial / CRITIC / OPTIMIZER)
    if replay is not None:
        (partial / REPLAY).write_text(replay.state())
    (partial / STATE).write_text(json.dumps(asdict(progress)))
    shutil.rmtree(final, ignore_errors=True)
    # By rename: a run that dies here leaves the checkpoint before this one as the newest.
    os.replace(partial, final)
    return final


def newest(folder: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        ConfigError: there is none.
    """
    found = sorted((folder / "checkpoints").glob("step-??????"))
    if not found:
        # A folder that has a run is refused without --resume.
        anew = (
            "with another --run-dir" if (folder / "metrics.jsonl").exists() else "without --resume"
        )
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint; start anew {anew} (trainer.checkpoint_every says how often "
            "one is made)"
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
