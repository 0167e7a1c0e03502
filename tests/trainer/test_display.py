"""What a run shows: plain lines where there is no terminal, a live bar where there is one, a table and a plot."""

import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trainer.display import Display, show_summary
from trainer.evaluate import Accuracy
from trainer.ledger import Ledger
from trainer.report import Measurement, Summary, plot

VALUES = {
    "reward": {"mean": 0.625}, "participating": 0.25, "clip_fraction": 0.125, "mismatch": 1e-6,
    "version": 7, "seconds": {"rollout": 1.5, "publish": 0.01},
}  # fmt: skip


def measurement(step: int, mean: float, greedy: float | None) -> Measurement:
    def accuracy(value: float) -> Accuracy:
        return Accuracy(
            questions=512, samples=4, mean=value, standard_error=0.01, unfinished=0.0, mean_tokens=74.0,
            sampled_tokens=1000, seconds=2.0, version=step,
        )  # fmt: skip

    found = None if greedy is None else accuracy(greedy)
    return Measurement(
        step=step,
        sampled_tokens=100 * step,
        seconds=2.0 * step,
        sampled=accuracy(mean),
        greedy=found,
    )


def summary(folder: Path) -> Summary:
    made = Summary(run="demo", folder=folder, sampled_tokens=12_345, rewards=[0.4, 0.5, 0.6])
    made.measurements = [
        measurement(0, 0.4, 0.6),
        measurement(2, 0.5, None),
        measurement(3, 0.55, 0.7),
    ]
    made.versions = {"server-1": 3}
    made.trees = Ledger(asked=9, trained=7, dropped=Counter({"refused: prompt": 2}))
    return made


def show(*, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=terminal)
    with Display("a run", console) as display:
        display.status("rollout")
        display.step(1, 4, VALUES)
        display.measured("before", measurement(0, 0.449, 0.641))
    return stream.getvalue()


def test_without_a_terminal_every_step_is_a_line() -> None:
    lines = show(terminal=False).splitlines()
    assert lines[0] == "a run"
    assert lines[1].startswith("step 1/4  reward 0.625  participating 25.0 %  clipped 12.5 %")
    assert lines[1].endswith("version 7  rollout 1.5 s")
    assert "pass@1 44.9 % ± 1.0, greedy 64.1 %" in lines[2]


@pytest.mark.parametrize(("delta", "said"), [(5_044, "5.0 kB"), (None, "1.7 MB")])
def test_a_step_says_what_a_server_fetches_of_its_version(delta: int | None, said: str) -> None:
    stream = io.StringIO()
    published = [{"delta_bytes": delta, "stored_bytes": 1_680_356}]
    Display("a run", Console(file=stream, width=200)).step(1, 4, {**VALUES, "published": published})
    assert f"version 7  weights {said}  rollout" in stream.getvalue()


@pytest.mark.parametrize("text", ["a run", "1/4", "training reward", "pass@1 44.9 % ± 1.0"])
def test_on_a_terminal_there_is_a_bar_and_measurements_stay(text: str) -> None:
    assert text in show(terminal=True)


def test_questions_without_an_answer_are_counted_beside_those_measured(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    found = measurement(2, 0.5, 0.7)
    found = replace(found, sampled=replace(found.sampled, lost=3))
    Display("a run", console).measured("during", found)
    show_summary(
        Summary(run="demo", folder=tmp_path, measurements=[found]), Console(file=stream, width=160)
    )
    assert "[512 questions x 4, 3 more without an answer, 2.0 s]" in stream.getvalue()
    assert "after 2 steps (3 without an answer)" in stream.getvalue()


def test_the_table_at_the_end_says_what_happened(tmp_path: Path) -> None:
    stream = io.StringIO()
    show_summary(summary(tmp_path), Console(file=stream, width=160))
    shown = stream.getvalue()
    for text in (
        "+15.0 points",
        "+10.0 points",
        "12,345",
        "server-1 reached version",
        "trees dropped, refused: prompt",
        "7 of 9",
    ):
        assert text in shown
    assert str(tmp_path / "learning_curve.png") in shown


@pytest.mark.parametrize("measured", [True, False])
def test_the_learning_curve_is_a_picture(tmp_path: Path, measured: bool) -> None:
    made = summary(tmp_path)
    if not measured:
        made.measurements = []
    plot(made, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_said_has_its_time_and_is_no_markup() -> None:
    stream = io.StringIO()
    Display("a run", Console(file=stream, width=200)).say("version 3 waits: [red] is no folder")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d version 3 waits: \[red\] is no folder\n", stream.getvalue()
    )
