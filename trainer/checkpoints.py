"""What a run leaves on disk: a model that anyone can load, and the state to go on from."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from shared.errors import ConfigError
from trainer.optimizer import PolicyOptimizer

STATE = "state.json"
OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands. Data order and seeds follow from the step alone."""

    step: int
    """Steps done."""
    version: int
    """Newest version that was published."""
    sampled_tokens: int


def save(
    folder: Path,
    policy: PreTrainedModel,
    source: str,
    optimizer: PolicyOptimizer,
    progress: Progress,
) -> Path:
    """Write one checkpoint, whole or not at all.

    Args:
        folder: of the run; the checkpoint goes to `checkpoints/step-000007` below it.
        policy: the model.
        source: checkpoint that the run started from, for the tokenizer.
        optimizer: its state goes beside the model.
        progress: where the run stands.

    Returns:
        The checkpoint's folder, which is a Hugging Face checkpoint too.
    """
    final = folder / "checkpoints" / f"step-{progress.step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    torch.save(optimizer.state_dict(), partial / OPTIMIZER)
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
        raise ConfigError(f"--resume: {folder} holds no checkpoint; start it without --resume")
    return found[-1]


def restore(checkpoint: Path, optimizer: PolicyOptimizer) -> Progress:
    """Load the optimizer's state; the model is loaded from the folder itself.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    try:
        optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER, weights_only=True))
    except ValueError as error:
        raise ConfigError(f"--resume: {checkpoint}: {error}") from None
    return Progress(**json.loads((checkpoint / STATE).read_text()))
