"""What a step measured: one JSON object a line, and the same numbers to TensorBoard."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.tree import FinishReason, Role
from shared.wire import RolloutTreeResponse
from trainer.algorithms.base import Segment
from trainer.critic import CriticReport
from trainer.replay import Replay
from trainer.update import UpdateReport


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard's events in a run's folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        _end_at_a_whole_line(path)
        self._stream = path.open("a", buffering=1)
        self._board: Any = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._board.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; numbers that are not finite are written as null, so that any JSON reader takes it."""
        self._stream.write(json.dumps({"step": step, **_finite(values)}) + "\n")
        for name, number in _numbers(values, ""):
            self._board.add_scalar(name, number, step)


def _end_at_a_whole_line(path: Path) -> None:
    """Cut off the half line that a killed run may have left: the next line would be lost with it."""
    if path.exists():
        with path.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def _finite(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{key}", float(value)))
    return found


def moments(values: Sequence[float]) -> dict[str, float]:
    """Mean, population standard deviation, least and greatest; zeros for nothing.

    >>> moments([0.0, 1.0])
    {'mean': 0.5, 'std': 0.5, 'min': 0.0, 'max': 1.0}
    """
    if not values:
        return {"mean": 0.0, "std": 0.0, "min": 0.0, "max": 0.0}
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return {"mean": mean, "std": math.sqrt(variance), "min": min(values), "max": max(values)}


def of_trees(trees: Sequence[RolloutTreeResponse]) -> dict[str, Any]:
    """Rewards, values, tokens, versions and reward failures of a step's trees."""
    leaves = [leaf for tree in trees for leaf in tree.leaves() if leaf.role is Role.SEGMENT]
    values = [node.value for tree in trees for node in tree.nodes if node.value is not None]
    return {
        "reward": moments([leaf.reward or 0.0 for leaf in leaves]),
        "value": moments(values),
        # Each question counts once, however many leaves early decisions have left it.
        "question_reward": moments([_mean_reward(tree) for tree in trees])["mean"],
        "trees": len(trees),
        "leaves": len(leaves),
        "unfinished": sum(leaf.finish_reason is FinishReason.LENGTH for leaf in leaves)
        / max(1, len(leaves)),
        "reward_errors": sum(leaf.reward_error is not None for leaf in leaves),
        "tokens": {
            "prompt": sum(tree.usage.prompt_tokens for tree in trees),
            # At every server that had a part in it: trees move, and are begun anew.
            "sampled": sum(tree.usage.spent_tokens for tree in trees),
            "given": sum(tree.usage.given_tokens for tree in trees),
            "discarded": sum(tree.usage.discarded_tokens for tree in trees),
            "prefilled": sum(tree.usage.computed_prefill_tokens for tree in trees),
            "cached": sum(tree.usage.cached_tokens for tree in trees),
        },
        "versions": {
            "min": min(tree.weight_versions.min for tree in trees),
            "max": max(tree.weight_versions.max for tree in trees),
        },
        "servers": dict(Counter(tree.server_id for tree in trees)),
    }


def _mean_reward(tree: RolloutTreeResponse) -> float:
    return moments([leaf.reward or 0.0 for leaf in tree.leaves() if leaf.role is Role.SEGMENT])[
        "mean"
    ]


def of_segments(
    segments: Sequence[Segment], trees: Sequence[RolloutTreeResponse]
) -> dict[str, Any]:
    """Advantages of the segments that train, and why the others do not."""
    nodes = [node for tree in trees for node in tree.nodes if node.role is Role.SEGMENT]
    empty = sum(not node.token_ids for node in nodes)
    return {
        "segments": len(segments),
        "advantage": moments([segment.advantage for segment in segments]),
        "dropped": {"no_tokens": empty, "no_advantage": len(nodes) - empty - len(segments)},
    }


def of_staleness(segments: Sequence[Segment], version: int) -> dict[str, Any]:
    """How many versions older than the policy the trained tokens are, masked ones counted.

    A segment that replay brings back is as old as it is: replay's age is in steps since it was sampled, whichever
    versions those were, and has a bound of its own.

    Args:
        segments: that train in the step.
        version: of the policy before the step.
    """
    lags: Counter[int] = Counter()
    for segment in segments:
        for sampled_by, count in segment.node.versions:
            lags[version - sampled_by] += count
    tokens = lags.total()
    return {
        "staleness": {
            "mean": sum(lag * count for lag, count in lags.items()) / max(1, tokens),
            "max": max(lags, default=0),
            "shares": {str(lag): count / tokens for lag, count in sorted(lags.items())},
        }
    }


def of_replay(replay: Replay | None, segments: Sequence[Segment]) -> dict[str, Any]:
    """What trained of all that waited, what still waits, and what grew too old so far."""
    if replay is None:
        return {}
    return {"replay": {"trained": len(segments), "waiting": len(replay), "too_old": replay.dropped}}


def of_updates(updates: Sequence[UpdateReport]) -> dict[str, Any]:
    """Means over a step's updates, weighted by their participating tokens."""
    tokens = sum(u.means.get("tokens", 0.0) for u in updates)
    response = sum(u.response_tokens for u in updates)

    def mean(name: str) -> float:
        return sum(u.means.get(name, 0.0) * u.means.get("tokens", 0.0) for u in updates) / max(
            1.0, tokens
        )

    entropy = sum(u.entropy * u.means.get("tokens", 0.0) for u in updates) / max(1.0, tokens)
    return {
        "participating": tokens / max(1, response),
        "policy_loss": mean("objective"),
        "ratio": mean("ratio"),
        "clip_fraction": mean("clipped"),
        "kl": mean("kl"),
        "approx_kl": mean("approx_kl"),
        "entropy": entropy,
        # Before any step of this iteration the two sides compute the same thing: what is left is disagreement.
        "mismatch": updates[0].means.get("mismatch", 0.0) if updates else 0.0,
        # 1 and 0 without a correction.
        "weight": mean("weight") if tokens else 1.0,
        "limited": mean("limited"),
        "gradient_norm": max((u.step.gradient_norm for u in updates), default=0.0),
        "learning_rate": updates[-1].step.learning_rate if updates else 0.0,
        **_of_critics([u.critic for u in updates if u.critic is not None]),
        "skipped": dict(Counter(u.skipped_for for u in updates if u.skipped_for)),
        "trained_tokens": response,
        "computed_tokens": sum(u.computed_tokens for u in updates),
    }


def _of_critics(reports: Sequence[CriticReport]) -> dict[str, Any]:
    if not reports:
        return {}
    return {
        "critic": {
            "loss": moments([report.loss for report in reports])["mean"],
            "explained_variance": moments([r.explained_variance for r in reports])["mean"],
            "gradient_norm": max(report.gradient_norm for report in reports),
        }
    }
