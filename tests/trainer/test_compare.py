"""`spoke compare`: what is run, what is taken as done, and what is made of the curves."""

import json
import math
from pathlib import Path

import pytest

from shared.errors import ConfigError
from trainer import compare
from trainer.cli import main
from trainer.compare import Curve
from trainer.report import SUMMARY

ROOT = Path(__file__).resolve().parents[2]
GRPO, TREE = (ROOT / "configs" / "compare" / f"{name}.toml" for name in ("grpo", "spo-tree"))
BUDGET = ["trainer.budget_tokens=1000"]


def curve(variant, seed, accuracy, seconds=(0.0, 10.0), tokens=(0, 100)):
    return Curve(
        variant=variant, seed=seed, tokens=tokens, seconds=seconds, accuracy=accuracy,
        standard_error=0.01, greedy=None, steps=3,
    )  # fmt: skip


def test_runs_are_paired_seed_by_seed_and_the_grid_is_crossed():
    grid = {"trainer.learning_rate": ["1e-4", "2e-4"], "trainer.epochs": ["1", "2"]}
    runs = compare.plan([GRPO, TREE], [0, 1], BUDGET, grid)
    assert len(runs) == 2 * 2 * 4
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8
    assert runs[1].name == "grpo-learning_rate=1e-4-epochs=2-seed0"
    assert runs[1].settings.trainer.learning_rate == 1e-4
    assert runs[1].settings.trainer.epochs == 2
    assert runs[9].settings.seed == 1
    # The same questions in the same order, whatever the algorithm.
    assert {run.settings.data.train for run in runs} == {runs[0].settings.data.train}


@pytest.mark.parametrize(
    ("overrides", "seeds", "message"),
    [
        ([], [0], "it has no budget; use --tokens or --seconds"),
        (BUDGET, [0, 0], "a seed is given twice"),
        ([*BUDGET, "trainer.step=3"], [0], "unknown key 'trainer.step'"),
    ],
)
def test_what_cannot_be_compared_is_named(overrides, seeds, message):
    with pytest.raises(ConfigError, match=message):
        compare.plan([GRPO, TREE], seeds, overrides, {})


def test_configurations_that_measure_differently_are_refused(tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(f'base = "{GRPO}"\n[evaluation]\nquestions = 7\n')
    with pytest.raises(ConfigError, match=r"other: its \[evaluation\] differs from that of grpo"):
        compare.plan([GRPO, other], [0], BUDGET, {})
    other.write_text(f'base = "{GRPO}"\n[trainer]\nbudget_seconds = 3\n')
    with pytest.raises(ConfigError, match=r"other: trainer\.budget_seconds differs"):
        compare.plan([GRPO, other], [0], BUDGET, {})


def test_a_finished_run_is_not_run_again_and_another_one_is_refused(tmp_path):
    (run,) = compare.plan([GRPO], [0], BUDGET, {})
    assert not compare.finished(run, tmp_path)
    (tmp_path / "config.json").write_text(run.settings.model_dump_json())
    assert not compare.finished(run, tmp_path)  # it was interrupted
    (tmp_path / SUMMARY).write_text("{}")
    assert compare.finished(run, tmp_path)
    (kept,) = compare.plan([GRPO], [0], [*BUDGET, "trainer.keep_checkpoints=9"], {})
    assert compare.finished(kept, tmp_path)  # of the same experiment
    (other,) = compare.plan([GRPO], [0], [*BUDGET, "trainer.epochs=3"], {})
    with pytest.raises(ConfigError, match="a run with another 'trainer' is in it already"):
        compare.finished(other, tmp_path)


def test_the_table_by_hand():
    curves = [
        curve("a", 0, (0.4, 0.6)),
        curve("b", 0, (0.4, 0.8), seconds=(0.0, 20.0)),
        curve("a", 1, (0.4, 0.5)),
        curve("b", 1, (0.4, 0.8), seconds=(0.0, 20.0)),
    ]
    a, b = compare.lines(curves)
    assert (a.seeds, a.before, a.final) == (2, 0.4, pytest.approx(0.55))
    assert a.spread == pytest.approx(math.sqrt(0.005))
    assert b.spread == 0
    # Paired: 0.2 and 0.3.
    assert b.against_first == pytest.approx(0.25)
    assert b.against_spread == pytest.approx(math.sqrt(0.005) / math.sqrt(2))
    assert (a.against_first, a.against_spread) == (0, 0)
    # At 10 s, when the fastest run was done, b is half-way.
    assert b.same_seconds == pytest.approx(0.6)
    assert a.same_seconds == pytest.approx(0.55)
    table = compare.markdown(curves).splitlines()
    assert table[2].startswith("| b | 2 | 40.0 | **80.0** ± 0.0 | +25.0 ± 5.0 |")
    assert table[3].startswith("| a | 2 | 40.0 | **55.0** ± 7.1 | +0.0 ± 0.0 |")


def test_one_seed_and_one_measurement_are_enough(tmp_path):
    curves = [curve("a", 0, (0.4,), seconds=(0.0,), tokens=(0,))]
    assert compare.lines(curves)[0].spread == 0
    compare.plot(curves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    json.dumps(compare.as_json(curves))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,x"], "--seeds 0,x: write whole numbers"),
        (["--grid", "trainer.epochs"], "--grid trainer.epochs: write KEY=VALUE"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, capsys):
    code = main(["compare", str(GRPO), "--out", str(tmp_path), "--tokens", "1000", *arguments])
    assert code == 2
    assert message in capsys.readouterr().err
