"""Several training configurations from one warm start on one budget: what is run, and what is made of the results.

    configurations x variants of a grid x seeds -> runs, one after the other -> summaries -> table and plot

Everything is read from the runs' own `summary.json`: a comparison that is taken up again runs what is missing.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from shared.errors import ConfigError
from trainer.config import TrainSettings, load
from trainer.report import SUMMARY

SHARED = ("model", "data", "reward", "evaluation")
"""Sections that must be the same in all configurations, else accuracies do not compare."""
ONE_BUDGET = ("budget_tokens", "budget_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run of a comparison."""

    variant: str
    """The configuration's file name without its ending, with the grid's values where there is a grid."""
    seed: int
    settings: TrainSettings

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one run measured, in the order of time."""

    variant: str
    seed: int
    tokens: tuple[int, ...]
    """[M] sampled in training before each measurement."""
    seconds: tuple[float, ...]
    """[M] of training before each measurement."""
    accuracy: tuple[float, ...]
    """[M] held-out mean reward."""
    standard_error: float
    """Of the last measurement, over questions."""
    greedy: float | None
    """At the end."""
    steps: int

    def at_seconds(self, moment: float) -> float:
        """Accuracy at a moment, linear between measurements; the last one after the end."""
        return float(np.interp(moment, self.seconds, self.accuracy))


def plan(
    configs: Sequence[Path],
    seeds: Sequence[int],
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[str]],
) -> list[Run]:
    """All runs, seed by seed, so that a machine that slows down slows every variant.

    Args:
        configs: training configurations.
        seeds: each is one run of each variant.
        overrides: `key=value` of every run.
        grid: values of each key; every combination is a variant of every configuration.

    Raises:
        ConfigError: a configuration cannot be used, or two do not compare.
    """
    combinations = [
        [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
        for values in itertools.product(*grid.values())
    ]
    runs = []
    for seed, config, combination in itertools.product(seeds, configs, combinations):
        variant = "-".join([config.stem, *(part.rpartition(".")[2] for part in combination)])
        chosen = [f"run={variant.replace('=', '-')}-seed{seed}", f"seed={seed}"]
        # A run that was interrupted is begun anew: checkpoints would only take time.
        settings = load(config, ["trainer.checkpoint_minutes=0", *overrides, *combination, *chosen])
        runs.append(Run(variant=variant, seed=seed, settings=settings))
    _check(runs)
    return runs


def _check(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        raise ConfigError("two configurations have the same file name, or a seed is given twice")
    first = runs[0].settings
    for run in runs:
        trainer = run.settings.trainer
        for section in SHARED:
            if getattr(run.settings, section) != getattr(first, section):
                raise ConfigError(
                    f"{run.variant}: its [{section}] differs from that of {runs[0].variant}: accuracies would not "
                    f"compare; make them the same, or set it for all with --set {section}.…"
                )
        for key in ONE_BUDGET:
            if getattr(trainer, key) != getattr(first.trainer, key):
                raise ConfigError(
                    f"{run.variant}: trainer.{key} differs; use --tokens or --seconds"
                )
        if trainer.budget_tokens is None and trainer.budget_seconds is None:
            raise ConfigError(f"{run.variant}: it has no budget; use --tokens or --seconds")


def finished(run: Run, folder: Path) -> bool:
    """True if the run's results lie in `folder`.

    Raises:
        ConfigError: they are of other settings.
    """
    if not (folder / SUMMARY).is_file():
        return False
    saved = json.loads((folder / "config.json").read_text())
    # Where Redis was, which checkout holds the model and what was kept say nothing of the experiment.
    for settings in (saved, mine := json.loads(run.settings.model_dump_json())):
        settings["fleet"]["redis_url"] = None
        settings["model"]["path"] = Path(settings["model"]["path"]).name
        for name in ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints"):
            settings["trainer"].pop(name, None)
    for section in saved:
        if saved[section] != mine.get(section):
            raise ConfigError(
                f"{folder}: a run with another {section!r} is in it already; choose another --out, or remove it"
            )
    return True


def read(run: Run, folder: Path) -> Curve:
    """The curve of a finished run."""
    summary = json.loads((folder / SUMMARY).read_text())
    measured: list[dict[str, Any]] = summary["measurements"]
    last = measured[-1]
    return Curve(
        variant=run.variant,
        seed=run.seed,
        tokens=tuple(m["sampled_tokens"] for m in measured),
        seconds=tuple(m["seconds"] for m in measured),
        accuracy=tuple(m["sampled"]["mean"] for m in measured),
        standard_error=last["sampled"]["standard_error"],
        greedy=None if last["greedy"] is None else last["greedy"]["mean"],
        steps=summary["steps"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One variant over its seeds. Spreads are sample standard deviations over seeds; 0 for one seed."""

    variant: str
    seeds: int
    before: float
    final: float
    """Mean accuracy at the end of the budget."""
    spread: float
    against_first: float
    """Mean paired difference to the first variant, seed by seed."""
    against_spread: float
    """Standard error of it; 0 for one seed."""
    greedy: float | None
    same_seconds: float
    """Mean accuracy at the moment when the fastest run of all was done."""
    steps: float
    tokens: float
    seconds: float


def lines(curves: Sequence[Curve]) -> list[Line]:
    """One line a variant, in the order of their first curves."""
    moment = min(curve.seconds[-1] for curve in curves)
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.variant, []).append(curve)
    first = {curve.seed: curve for curve in next(iter(groups.values()))}
    return [_line(variant, group, first, moment) for variant, group in groups.items()]


def _line(variant: str, group: list[Curve], first: Mapping[int, Curve], moment: float) -> Line:
    finals = [curve.accuracy[-1] for curve in group]
    paired = [c.accuracy[-1] - first[c.seed].accuracy[-1] for c in group if c.seed in first]
    greedy = [curve.greedy for curve in group if curve.greedy is not None]
    return Line(
        variant=variant,
        seeds=len(group),
        before=fmean(curve.accuracy[0] for curve in group),
        final=fmean(finals),
        spread=_spread(finals),
        against_first=fmean(paired) if paired else math.nan,
        against_spread=_spread(paired) / math.sqrt(max(1, len(paired))),
        greedy=fmean(greedy) if greedy else None,
        same_seconds=fmean(curve.at_seconds(moment) for curve in group),
        steps=fmean(curve.steps for curve in group),
        tokens=fmean(curve.tokens[-1] for curve in group),
        seconds=fmean(curve.seconds[-1] for curve in group),
    )


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def markdown(curves: Sequence[Curve]) -> str:
    """The table as Markdown, best first."""
    found = lines(curves)
    moment = min(curve.seconds[-1] for curve in curves)
    head = (
        f"| configuration | seeds | before, % | at the end, % | paired difference to {found[0].variant} "
        "| greedy, % "
        f"| after {moment:.0f} s, % | steps | sampled tokens | seconds |"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for line in sorted(found, key=lambda line: -line.final):
        greedy = "" if line.greedy is None else f"{100 * line.greedy:.1f}"
        rows.append(
            f"| {line.variant} | {line.seeds} | {100 * line.before:.1f} "
            f"| **{100 * line.final:.1f}** ± {100 * line.spread:.1f} "
            f"| {100 * line.against_first:+.1f} ± {100 * line.against_spread:.1f} | {greedy} "
            f"| {100 * line.same_seconds:.1f} | {line.steps:.0f} | {line.tokens:,.0f} | {line.seconds:.0f} |"
        )
    return "\n".join(rows) + "\n"


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Accuracy against sampled tokens and against seconds: means over seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    for panel, unit in zip(panels, ("tokens", "seconds"), strict=True):
        for number, variant in enumerate(variants):
            own = [curve for curve in curves if curve.variant == variant]
            grid = np.linspace(0, min(getattr(curve, unit)[-1] for curve in own), 60)
            values = np.array([np.interp(grid, getattr(c, unit), c.accuracy) for c in own]) * 100
            colour = f"C{number % 10}"
            style = "-" if number < 10 else "--"
            panel.plot(grid, values.mean(0), style, color=colour, label=variant)
            panel.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.12)
        panel.set_xlabel(f"sampled {unit}" if unit == "tokens" else "seconds of training")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, %")
    panels[1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def as_json(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """Every run, for programs."""
    return [{field: getattr(curve, field) for field in Curve.__slots__} for curve in curves]
