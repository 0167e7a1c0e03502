"""One settings tree for a training run, read from TOML; unknown keys name the nearest known one."""

import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from shared.errors import ConfigError
from shared.manifest import check_run_name
from shared.redis_url import VARIABLE, refuse_password
from shared.wire import ChainPlan, TreePlan, field_path
from trainer.algorithms.base import AlgorithmName, AlgorithmSettings
from trainer.settings import (
    Average,
    CriticSettings,
    DataSettings,
    EvaluationSettings,
    FleetSettings,
    LaunchSettings,
    ModelSettings,
    ReplaySettings,
    RewardSettings,
    RolloutSettings,
    Settings,
    TrainerSettings,
)

PLANS: dict[AlgorithmName, tuple[str, ...]] = {
    AlgorithmName.SPO_TREE: ("tree", "group"),
    AlgorithmName.SPO_CHAIN: ("chain",),
    AlgorithmName.VINEPPO: ("chain",),
    AlgorithmName.GRPO: ("group",),
    AlgorithmName.RLOO: ("group",),
    AlgorithmName.PPO: ("group",),
}
"""Kinds of plan that each algorithm reads."""

EXAMPLES = {
    "tree": '{ kind = "tree", branch_factors = [4, 2, 2], segment_tokens = 100 }',
    "chain": '{ kind = "chain", samples = 8, value_rollouts = 9, partition = { kind = "cutpoints" } }',
    "group": '{ kind = "group", samples = 8 }',
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "reference": {
        "algorithm": {"zero_tolerance": 0.0},
        "trainer": {"whiten": "micro_batch", "average": "micro_batch"},
    },
}
"""Settings by the name of a preset; what a file gives itself goes first.

`reference` is what the authors' code does, for comparison only: whitening and averaging over each micro-batch by
itself, and dropping exact zeros alone. Our defaults repair both (DESIGN section 4).
"""


class TrainSettings(Settings):
    """A whole run."""

    run: str
    preset: str | None = None
    """Settings to start from, by name; see `PRESETS`."""
    hardware: str = ""
    """What the run expects, for people."""
    seed: int = 0
    model: ModelSettings
    data: DataSettings
    reward: RewardSettings = RewardSettings()
    rollout: RolloutSettings
    algorithm: AlgorithmSettings = AlgorithmSettings()
    replay: ReplaySettings = ReplaySettings()
    critic: CriticSettings = CriticSettings()
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
        plan, name = self.rollout.plan, self.algorithm.name
        kinds = PLANS[name]
        flat = isinstance(plan, TreePlan) and len(plan.branch_factors) == 1
        if plan.kind not in kinds and not (flat and "group" in kinds):
            raise ValueError(
                f"algorithm.name = {name!s} does not read a plan of kind {plan.kind!r}: "
                f"use rollout.plan = {EXAMPLES[kinds[0]]}"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_plan(self) -> Self:
        plan = self.rollout.plan
        cutpoints = isinstance(plan, ChainPlan) and plan.partition.kind == "cutpoints"
        if self.algorithm.name is AlgorithmName.VINEPPO and cutpoints:
            raise ValueError(
                "algorithm.name = vineppo needs a value at the prompt, which cutpoints do not give: "
                'use rollout.plan.partition = { kind = "delimiter" }, or spo_chain'
            )
        if plan.kind == "tree" and self.trainer.average in (Average.SEQUENCE, Average.CONSTANT):
            raise ValueError(
                f"trainer.average = {self.trainer.average!s} is about whole responses, which a tree's segments "
                'share: use trainer.average = "token"'
            )
        if self.replay.enabled and self.algorithm.name is AlgorithmName.PPO:
            raise ValueError(
                "replay.enabled: ppo's advantages are as old as its critic; turn it off"
            )
        if self.algorithm.overlong_buffer >= self.rollout.max_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer = {self.algorithm.overlong_buffer} leaves nothing of "
                f"rollout.max_tokens = {self.rollout.max_tokens}; make it smaller"
            )
        if self.rollout.savings.look_at_rewards:
            self._check_rewards_decide()
        if self.evaluation.points and not (
            self.trainer.budget_tokens or self.trainer.budget_seconds
        ):
            raise ValueError(
                "evaluation.points are shares of a budget: set trainer.budget_tokens or trainer.budget_seconds, "
                "or use evaluation.every"
            )
        return self

    def _check_rewards_decide(self) -> None:
        """Leaves of equal reward must be without any advantage, or what is saved would have taught something."""
        if self.algorithm.name is AlgorithmName.PPO:
            raise ValueError(
                "rollout.savings.settle_after: ppo learns from responses of equal reward too; leave it out"
            )
        if self.algorithm.overlong_buffer:
            raise ValueError(
                "rollout.savings: servers see rewards without algorithm.overlong_buffer's penalty, which may "
                "differ where they agree; leave out settle_after and probe, or set the buffer to 0"
            )


def load(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read a configuration file and apply `--set` overrides, the environment's `SPOKE_REDIS_URL` between them.

    Args:
        path: a TOML file; `base = "other.toml"` at its top takes that file's settings first.
        overrides: `section.key=value`, the value as TOML writes it, or `null`; a bare word is a string.

    Raises:
        ConfigError: the file, a key or a value cannot be used; it names the key and the remedy.
    """
    raw = _read(path)
    fleet = raw.setdefault("fleet", {})
    if (url := os.environ.get(VARIABLE)) and isinstance(fleet, dict):
        fleet["redis_url"] = url
    for override in overrides:
        refuse_password(override, "--set fleet.redis_url")
        apply_override(raw, override)
    raw = with_preset(raw)
    try:
        return TrainSettings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, TrainSettings)}") from None


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's settings on top of those of its `base`, the model's folder made one that any process finds."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    model = raw.get("model", {})
    if isinstance(model, dict) and (local := path.parent / str(model.get("path"))).is_dir():
        raw["model"] = model | {"path": str(local.resolve())}
    if "base" not in raw:
        return raw
    base = path.parent / str(raw.pop("base"))
    readers = (*below, path.resolve())
    if base.resolve() in readers:
        raise ConfigError(f"{path}: base = {str(base)!r} leads back to itself")
    return _merge(_read(base, readers), raw)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a key's own value, a plan for one, is replaced whole.

    >>> _merge({"run": "a", "trainer": {"steps": 4, "epochs": 1}}, {"trainer": {"steps": 8}})
    {'run': 'a', 'trainer': {'steps': 8, 'epochs': 1}}
    """
    merged = {
        key: under[key] | value
        if isinstance(value, dict) and isinstance(under.get(key), dict)
        else value
        for key, value in over.items()
    }
    return under | merged


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, on top of those of the preset that it names.

    Raises:
        ConfigError: there is no such preset.
    """
    name = raw.get("preset")
    if name is None:
        return raw
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}: there is {', '.join(PRESETS)}")
    return _merge(PRESETS[name], raw)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into the raw settings of a file.

    Raises:
        ConfigError: it is not of that form.
    """
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"--set {override}: write section.key=value")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    if text.strip() == "null":  # TOML has none
        table[name] = None
        return
    try:
        table[name] = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        table[name] = text


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a validation error in one line, with the nearest known key for an unknown one."""
    # A misspelt key often leaves the right one missing: the spelling is what helps.
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        name = str(first["loc"][-1])
        if elsewhere := _sections_with(name, root):
            return f"unknown key {where!r}; did you mean {' or '.join(elsewhere)}?"
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        return f"unknown key {where!r}; the nearest known one is {near[0] if near else known!r}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _sections_with(name: str, root: type[BaseModel]) -> list[str]:
    """`section.name` for each section that has a key of this name."""
    return [
        f"{section}.{name}"
        for section, field in root.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, BaseModel)
        and name in field.annotation.model_fields
    ]


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
