"""What a run tells its user: progress while it runs, a table and a plot at its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoints import Progress
from trainer.evaluate import Accuracy
from trainer.ledger import Ledger

SUMMARY = "summary.json"
"""In a run's folder once it is done: `Summary.as_json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Accuracy at one moment of a run."""

    step: int
    """Steps done before it."""
    sampled_tokens: int
    """In training, before it."""
    seconds: float
    """Of training before it; measurements and checkpoints not counted."""
    sampled: Accuracy
    greedy: Accuracy | None


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run did, filled as it goes."""

    run: str
    folder: Path
    steps: int = 0
    measurements: list[Measurement] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """[steps] mean reward of each step's trees."""
    sampled_tokens: int = 0
    """In training; measurements not counted."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""
    versions: dict[str, int] = field(default_factory=dict)
    """Newest version that each server reached, by server id."""
    trees: Ledger = field(default_factory=Ledger)
    """What became of every tree that was asked for, resumptions included."""
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a phase."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def seconds_of_training(self, without: frozenset[str]) -> float:
        """Seconds of all phases but some."""
        return sum(seconds for name, seconds in self.seconds.items() if name not in without)

    def add_step(self, reward: float, progress: Progress) -> None:
        """Count one step: its mean reward, and where the run stands after it."""
        self.steps, self.sampled_tokens = progress.step, progress.sampled_tokens
        self.rewards.append(reward)

    def as_json(self) -> dict[str, Any]:
        """What a program wants to know of a finished run."""
        return {
            "run": self.run,
            "steps": self.steps,
            "sampled_tokens": self.sampled_tokens,
            "seconds": self.seconds,
            "rewards": self.rewards,
            "measurements": [asdict(measurement) for measurement in self.measurements],
            "trees": self.trees.as_json(),
        }


class Reporter(Protocol):
    """Shows a run to someone."""

    def status(self, text: str) -> None:
        """What goes on now."""
        ...

    def say(self, text: str) -> None:
        """A line that stays, such as what the run waits for."""
        ...

    def step(self, done: int, total: int, values: dict[str, Any]) -> None:
        """A step is done; `values` is its line of metrics."""
        ...

    def measured(self, label: str, measurement: Measurement) -> None:
        """Accuracy was measured."""
        ...


def plot(summary: Summary, path: Path) -> None:
    """The learning curve: held-out accuracy and mean training reward, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    rewards = [100 * reward for reward in summary.rewards]
    axes.plot(
        range(1, len(rewards) + 1), rewards, color="0.75", linewidth=1, label="training reward"
    )
    steps = [m.step for m in summary.measurements]
    means = [100 * m.sampled.mean for m in summary.measurements]
    errors = [100 * m.sampled.standard_error for m in summary.measurements]
    axes.errorbar(
        steps,
        means,
        yerr=errors,
        marker="o",
        capsize=3,
        label="held-out pass@1, sampled",
    )
    greedy = [(m.step, 100 * m.greedy.mean) for m in summary.measurements if m.greedy]
    if greedy:
        axes.plot(*zip(*greedy, strict=True), "s--", label="held-out greedy")
    axes.set_xlabel("step")
    axes.set_ylabel("%")
    axes.set_title(f"{summary.run}: {summary.sampled_tokens:,} sampled tokens")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
