"""The load test itself: seconds of it on a real server, with everything that its ten minutes have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "load.py"


@pytest.mark.slow
def test_seconds_of_rough_clients_leave_nothing_behind(tiny_math: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(PROGRAM),
        "soak",
        "--engine",
        "transformers",
        "--model",
        str(tiny_math),
    ]
    command += [
        "--minutes",
        "0.133",
        "--max-batch",
        "64",
        "--kv-cache-gib",
        "0.1",
        "--compare",
        "0.2",
    ]
    command += ["--seed", "1", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["ok"]
    assert result["faults"] == []
    assert set(result["statuses"]) <= {"200", "429"}
    assert result["checked"]["trees"] == result["answers"] > 5
    assert result["checked"]["compared"] >= 1
    assert result["checked"]["wrong"] == 0
    assert sum(result["disconnects"]) > 0
    assert set(result["left"].values()) == {0}
    assert result["settled_s"] < 5
    assert not (tmp_path / "out").exists()  # nothing to show
