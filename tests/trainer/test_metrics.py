"""Of steps: `metrics.jsonl` of a run that was killed in the middle of a line, and what budgets count."""

import json
from pathlib import Path

from fake_rollouts import ANSWER

from shared.wire import RolloutTreeResponse
from trainer.metrics import MetricsLog, of_trees


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


def test_tokens_count_wherever_they_were_sampled() -> None:
    """Of a tree that moved to another server, and of what was thrown away when it was begun anew."""

    def counted(**usage: int) -> int:
        body = ANSWER | {"usage": ANSWER["usage"] | usage}  # type: ignore[operator]
        return int(of_trees([RolloutTreeResponse.model_validate(body)])["tokens"]["sampled"])

    assert counted(sampled_tokens=6) == 6
    assert counted(sampled_tokens=1, given_tokens=5) == 6
    assert counted(sampled_tokens=6, discarded_tokens=3) == 9
