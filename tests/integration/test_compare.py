"""`spoke compare` for real: two short runs with fleets of their own, and again, where nothing is left to run."""

import json
from pathlib import Path

import pytest

from trainer.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_algorithms_side_by_side_and_nothing_twice(tmp_path, capsys):
    configs = [str(ROOT / "configs" / "compare" / f"{name}.toml") for name in ("grpo", "spo-chain")]
    small = [
        "rollout.questions=4",
        "launch.servers=1",
        "evaluation.questions=8",
        "evaluation.samples=1",
    ]
    command = [
        "compare",
        *configs,
        "--out",
        str(tmp_path),
        "--seeds",
        "3",
        "--tokens",
        "1500",
        "--points",
        "1",
    ]
    command += [word for setting in small for word in ("--set", setting)]
    assert main(command) == 0
    curves = json.loads((tmp_path / "comparison.json").read_text())
    assert [(curve["variant"], curve["seed"]) for curve in curves] == [
        ("grpo", 3),
        ("spo-chain", 3),
    ]
    for curve in curves:
        assert curve["tokens"][0] == 0
        assert curve["tokens"][-1] >= 1500
        assert curve["seconds"][-1] > 0
        assert len(curve["accuracy"]) == len(curve["tokens"])
    # Paired: both start from the same weights, and are measured on the same questions with the same seed.
    assert curves[0]["accuracy"][0] == curves[1]["accuracy"][0]
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    table = (tmp_path / "comparison.md").read_text()
    assert "| grpo |" in table
    assert "| spo-chain |" in table
    assert not (tmp_path / "grpo-seed3" / "weights").exists()

    written = (tmp_path / "grpo-seed3" / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert (tmp_path / "grpo-seed3" / "metrics.jsonl").stat().st_mtime_ns == written
