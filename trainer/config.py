"""One settings tree for a training run, read from TOML; unknown keys name the nearest known one."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared.errors import ConfigError
from shared.manifest import check_run_name
from shared.wire import Plan, TreePlan
from trainer.algorithms.base import AlgorithmName, AlgorithmSettings
from trainer.losses import KLEstimator
from trainer.optimizer import OptimizerSettings


class Settings(BaseModel):
    """Base of every section: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Settings):
    """The policy."""

    path: str
    """Checkpoint in Hugging Face format: a hub id, or a directory (relative ones start at the config file)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights that compute; bfloat16 keeps float32 masters in the optimizer."""
    device: str = "auto"
    """`auto` is a GPU where there is one."""
    threads: int = Field(default=1, ge=1)
    """Torch threads on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


class DataSettings(Settings):
    """Questions with answers, in GSM8K's format."""

    train: str
    """`problems:…`, a JSONL file, `gsm8k`, or `hub:NAME[:CONFIG]:SPLIT`."""
    heldout: str
    question_field: str = "question"
    answer_field: str = "answer"
    prompt: str = "{question}\n"
    """Template of the prompt."""
    chat: bool = False
    """Send the filled template as a user's message through the model's chat template."""

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, prompt: str) -> str:
        if "{question}" not in prompt:
            raise ValueError("the template needs {question}")
        return prompt


class RewardSettings(Settings):
    """Which reward function of the servers grades, and its options."""

    name: str = "gsm8k"
    options: dict[str, Any] = Field(default_factory=dict)


class RolloutSettings(Settings):
    """What is sampled in each step."""

    questions: int = Field(ge=1)
    """Questions a step, one tree each."""
    plan: Plan
    temperature: float = Field(default=1.0, gt=0.0)
    """0 would be greedy, which explores nothing; top-p and top-k are not offered, since the importance ratio
    needs the whole distribution."""
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(default=64, ge=1)
    """Most trees in flight."""
    timeout_s: float = Field(default=600.0, gt=0.0)
    """Bound of one tree, retries included."""


class TrainerSettings(OptimizerSettings):
    """The update, on top of the optimizer's own settings."""

    steps: int = Field(ge=1)
    """Iterations: rollout, update, publish."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates an iteration; each sees its share of the trees."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's trees."""
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.2, gt=0.0)
    kl: KLEstimator = KLEstimator.K3
    kl_coef: float = Field(default=1e-4, ge=0.0)
    """0 loads no reference model."""
    whiten: bool = True
    """Whiten advantages over the participating tokens of each optimizer batch."""
    token_budget: int = Field(default=16384, ge=1)
    """Most tokens of a micro-batch, padding included."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 is at the end alone."""

    @property
    def total_updates(self) -> int:
        """Where the learning-rate schedule ends."""
        return self.steps * self.updates_per_step * self.epochs


class FleetSettings(Settings):
    """Where the servers are and how versions reach them."""

    redis_url: str | None = None
    store: str | None = None
    """Weight store, any fsspec URL; None is `weights` in the run folder, for servers on this machine."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the published weights."""
    min_servers: int = Field(default=1, ge=1)
    wait_s: float = Field(default=300.0, gt=0.0)
    """Bound of a wait for servers or for a version."""
    keep_versions: int = Field(default=3, ge=1)


class EvaluationSettings(Settings):
    """Accuracy on held-out questions."""

    questions: int = Field(default=500, ge=1)
    samples: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    greedy: bool = True
    """Measure greedy accuracy too, before and after."""
    every: int = Field(default=0, ge=0)
    """Steps between measurements during training; 0 is none."""
    questions_during: int = Field(default=128, ge=1)


class LaunchSettings(Settings):
    """The servers that `spoke quickstart` starts on this machine."""

    servers: int = Field(default=2, ge=1)
    engine: Literal["auto", "vllm", "transformers"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    arguments: tuple[str, ...] = ()
    """Further arguments of `python -m server`."""


class TrainSettings(Settings):
    """A whole run."""

    run: str
    hardware: str = ""
    """What the run expects, for people."""
    seed: int = 0
    model: ModelSettings
    data: DataSettings
    reward: RewardSettings = RewardSettings()
    rollout: RolloutSettings
    algorithm: AlgorithmSettings = AlgorithmSettings()
    trainer: TrainerSettings
    fleet: FleetSettings = FleetSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    launch: LaunchSettings = LaunchSettings()

    @field_validator("run")
    @classmethod
    def _run_name(cls, run: str) -> str:
        return check_run_name(run)

    @model_validator(mode="after")
    def _plan_fits_algorithm(self) -> Self:
        plan = self.rollout.plan
        deep = isinstance(plan, TreePlan) and len(plan.branch_factors) > 1
        if deep and self.algorithm.name is not AlgorithmName.SPO_TREE:
            raise ValueError(
                f"algorithm.name = {self.algorithm.name!s} scores whole responses: "
                'use rollout.plan = { kind = "group", samples = N }'
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read a configuration file and apply `--set` overrides.

    Args:
        path: a TOML file.
        overrides: `section.key=value`, the value as TOML writes it; a bare word is a string.

    Raises:
        ConfigError: the file, a key or a value cannot be used; it names the key and the remedy.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _apply(raw, override)
    try:
        settings = TrainSettings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, TrainSettings)}") from None
    return _resolve_model(settings, path.parent)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"--set {override}: write section.key=value")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        table[name] = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        table[name] = text


def _resolve_model(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Make a directory that is given relative to the config file one that any process finds."""
    local = folder / settings.model.path
    if not local.is_dir():
        return settings
    model = settings.model.model_copy(update={"path": str(local.resolve())})
    return settings.model_copy(update={"model": model})


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a validation error in one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("tree", "group"))
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        return f"unknown key {where!r}; the nearest known one is {near[0] if near else known!r}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _known_keys(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Keys of the section at `location`."""
    model: Any = root
    for part in location:
        if hasattr(model, "model_fields"):
            model = model.model_fields[str(part)].annotation
        else:  # a discriminated union, such as a plan: `part` is the tag
            union: list[Any] = list(get_args(model))
            model = next(m for m in union if m.model_fields["kind"].default == part)
    return sorted(model.model_fields)
