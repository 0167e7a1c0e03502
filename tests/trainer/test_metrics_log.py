"""`metrics.jsonl` of a run that was killed in the middle of a line."""

import json
from pathlib import Path

from trainer.metrics import MetricsLog


def test_half_a_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    with MetricsLog(tmp_path) as log:
        log.write(2, {"reward": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_never_ended_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1')
    with MetricsLog(tmp_path) as log:
        log.write(1, {})
    assert path.read_text() == '{"step": 1}\n'
