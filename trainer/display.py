"""Progress and tables in the terminal, with rich: live where there is one, plain lines where there is none."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trainer.report import Measurement, Summary

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 60) -> str:
    """The last `width` values, each as a bar between 0 and 1.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    return "".join(
        BARS[round(min(1.0, max(0.0, value)) * (len(BARS) - 1))] for value in values[-width:]
    )


def percent(value: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * value:.1f} %"


class Display:
    """A `Reporter` on a terminal; use it as a context manager.

    Args:
        title: shown above the bar.
        console: where to.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Console()
        self._title = title
        self._rewards: list[float] = []
        self._status = ""
        self._line = ""
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("step", total=None)
        self._live = Live(
            self._render(), console=self.console, refresh_per_second=8, transient=True
        )

    def __enter__(self) -> Self:
        self.console.print(self._title, style="bold")
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def _render(self) -> Group:
        return Group(
            self._bar,
            Text(f"training reward  {sparkline(self._rewards)}  {self._line}"),
            Text(self._status, style="dim"),
        )

    def _refresh(self) -> None:
        if self.console.is_terminal:
            self._live.update(self._render())

    def status(self, text: str) -> None:
        """See `Reporter.status`."""
        self._status = text
        self._refresh()

    def say(self, text: str) -> None:
        """See `Reporter.say`; with the time, as servers' logs have it."""
        self._print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, done: int, total: int, values: dict[str, Any]) -> None:
        """See `Reporter.step`."""
        self._rewards.append(values["reward"]["mean"])
        self._bar.update(self._task, completed=done, total=total)
        seconds = values["seconds"]
        self._line = (
            f"reward {values['reward']['mean']:.3f}  participating {percent(values['participating'])}  "
            f"clipped {percent(values['clip_fraction'])}  mismatch {values['mismatch']:.1e}  "
            f"version {values['version']}"
        )
        if published := values.get("published"):
            size = sum(version["delta_bytes"] or version["stored_bytes"] for version in published)
            self._line += f"  weights {decimal(size)}"
        if stale := values.get("staleness", {}).get("mean"):
            self._line += f"  staleness {stale:.2f}"
        if self.console.is_terminal:
            self._refresh()
        else:
            phases = "  ".join(f"{name} {s:.1f} s" for name, s in seconds.items() if s >= 0.05)
            self._print(f"step {done}/{total}  {self._line}  {phases}")

    def measured(self, label: str, measurement: Measurement) -> None:
        """See `Reporter.measured`."""
        sampled = measurement.sampled
        greedy = f", greedy {percent(measurement.greedy.mean)}" if measurement.greedy else ""
        lost = f", {_lost(measurement)} more without an answer" if _lost(measurement) else ""
        self._print(
            f"held-out accuracy {label} (step {measurement.step}, version {sampled.version}): "
            f"pass@1 {percent(sampled.mean)} ± {100 * sampled.standard_error:.1f}{greedy}  "
            f"[{sampled.questions} questions x {sampled.samples}{lost}, {sampled.seconds:.1f} s]"
        )


def _lost(measurement: Measurement) -> int:
    """Questions that were not answered, sampled and greedy together."""
    return measurement.sampled.lost + (measurement.greedy.lost if measurement.greedy else 0)


def summary_tables(summary: Summary, elapsed_s: float) -> Group:
    """The tables at a run's end."""
    accuracy = Table(title="Held-out accuracy", title_justify="left")
    for column in ("", "pass@1, sampled", "greedy", "tokens/answer", "version"):
        accuracy.add_column(column, justify="left" if not column else "right")
    for measurement in summary.measurements:
        sampled = measurement.sampled
        accuracy.add_row(
            f"after {measurement.step} steps"
            + (f" ({_lost(measurement)} without an answer)" if _lost(measurement) else ""),
            f"{percent(sampled.mean)} ± {100 * sampled.standard_error:.1f}",
            percent(measurement.greedy.mean) if measurement.greedy else "",
            f"{sampled.mean_tokens:.0f}",
            str(sampled.version),
        )
    if len(summary.measurements) > 1:
        first, last = summary.measurements[0], summary.measurements[-1]
        gain = 100 * (last.sampled.mean - first.sampled.mean)
        greedy = ""
        if first.greedy and last.greedy:
            greedy = f"{100 * (last.greedy.mean - first.greedy.mean):+.1f} points"
        accuracy.add_row("gain", f"{gain:+.1f} points", greedy, "", "", style="bold")
    work = Table(title="Work", title_justify="left")
    work.add_column("")
    work.add_column("", justify="right")
    work.add_row("sampled tokens in training", f"{summary.sampled_tokens:,}")
    for name, seconds in summary.seconds.items():
        work.add_row(f"{name}, seconds", f"{seconds:.1f}")
    work.add_row("all, seconds", f"{elapsed_s:.1f}")
    for server, version in summary.versions.items():
        work.add_row(f"{server} reached version", str(version))
    trees = summary.trees
    work.add_row("trees trained, of those asked for", f"{trees.trained:,} of {trees.asked:,}")
    for reason, count in trees.dropped.items():
        work.add_row(f"trees dropped, {reason}", f"{count:,}")
    return Group(accuracy, work)


def show_summary(summary: Summary, console: Console) -> None:
    """Print the tables and say where everything lies."""
    console.print(summary_tables(summary, time.monotonic() - summary.started))
    console.print(f"run folder: {summary.folder}", highlight=False, soft_wrap=True)
    console.print(
        f"learning curve: {summary.folder / 'learning_curve.png'}", highlight=False, soft_wrap=True
    )
