"""What is left of full trees' advantages after early decisions: the numbers of `savings.py` and their table."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shared.tree import RolloutTree
from tests.benchmarks.gradient_signal import RHO
from trainer.algorithms import AlgorithmSettings, advantages
from trainer.algorithms.base import negligible, values
from trainer.mask import participates

MIXES = {"all": range(9), "rare": range(3), "sure": range(6, 9)}
"""Right answers among 8 that nothing else sees."""
FIELDS = (
    "full_tokens", "tokens", "trees", "early", "full_useful", "useful", "full_segments", "segments",
    "full_square", "square", "along", "full_value", "value", "full_variance", "variance",
)  # fmt: skip
"""What is counted of each tree, of the full one and of what is left."""
EVERY = AlgorithmSettings(drop_zero=False)
RESAMPLES = 2_000

Path = tuple[int, ...]


def paths(tree: RolloutTree) -> list[Path]:
    """[N] sibling positions from the prompt to each node."""
    found: list[Path] = [()]
    for node in tree.nodes[1:]:
        assert node.parent is not None
        found.append((*found[node.parent], tree.children[node.parent].index(node.id)))
    return found


def compared(full: RolloutTree, left: RolloutTree) -> dict[str, float]:
    """Advantages of both trees by segment, summed over participating tokens."""
    whole, kept = _segments(full), _segments(left)
    along = sum(
        tokens * a * whole[path][1]
        for path, (ids, a, tokens) in kept.items()
        if path in whole and whole[path][0] == ids
    )
    counts: dict[str, float] = {"along": along}
    for name, segments, tree in (("full_", whole, full), ("", kept, left)):
        useful = [(a, tokens) for _, a, tokens in segments.values() if not negligible(a)]
        counts[f"{name}segments"] = len(useful)
        counts[f"{name}useful"] = bool(useful)
        counts[f"{name}square"] = sum(tokens * a * a for a, tokens in useful)
        counts[f"{name}value"] = values(tree)[0] or 0.0
    return counts


def _segments(tree: RolloutTree) -> dict[Path, tuple[list[int], float, int]]:
    """(token ids, advantage, participating tokens) of each segment."""
    place = paths(tree)
    found = {}
    for segment in advantages(tree, EVERY):
        logprobs = np.array(segment.node.logprobs)
        tokens = int(participates(np.ones(len(logprobs), bool), logprobs, RHO).sum())
        found[place[segment.node_id]] = (segment.node.token_ids, segment.advantage, tokens)
    return found


def variances(full: Sequence[RolloutTree], left: Sequence[RolloutTree]) -> dict[str, float]:
    """Variance of V at depth 1 by two trees that share its segments, summed over nodes that branch in all."""
    known = [_first_values(tree) for tree in (*full, *left)]
    common = set.intersection(*(set(one) for one in known))
    squares = [
        [(one[at] - two[at]) ** 2 / 2 for at in common] for one, two in (known[:2], known[2:])
    ]
    return {"full_variance": sum(squares[0]), "variance": sum(squares[1])}


def _first_values(tree: RolloutTree) -> dict[int, float]:
    known = values(tree)
    return {
        place: value
        for place, child in enumerate(tree.children[0])
        if tree.children[child] and (value := known[child]) is not None
    }


def summary(found: np.ndarray) -> dict[str, Any]:
    """Ratios over questions, each with its error.

    Args:
        found: [questions, trees of each, fields].
    """
    rng = np.random.default_rng(0)
    by_question = found.sum(1)
    chosen = rng.integers(len(found), size=(RESAMPLES, len(found)))
    record: dict[str, Any] = {"questions": len(found)}
    estimates = _ratios(by_question.sum(0))
    resampled = _ratios(by_question[chosen].sum(1))
    for name, estimate in estimates.items():
        draws = resampled[name][np.isfinite(resampled[name])]
        known = bool(np.isfinite(estimate)) and len(draws) > RESAMPLES // 2
        record[name] = round(float(estimate), 4) if known else None
        record[f"{name}_error"] = round(float(draws.std()), 4) if known else None
    return record


def _ratios(sums: np.ndarray) -> dict[str, np.ndarray]:
    """[...] of sums [..., fields]."""
    of = {name: sums[..., place] for place, name in enumerate(FIELDS)}
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = of["tokens"] / of["full_tokens"]
        along = of["along"] / of["full_square"]
        return {
            "saved": 1 - rest,
            "early": of["early"] / of["trees"],
            "kept_questions": of["useful"] / of["full_useful"],
            "kept_segments": of["segments"] / of["full_segments"],
            "square": of["square"] / of["full_square"],
            "along": along,
            "per_token": along / rest,
            "square_per_token": of["square"] / of["full_square"] / rest,
            "bias": (of["value"] - of["full_value"]) / of["trees"],
            "variance": of["variance"] / of["full_variance"],
            "accuracy": of["full_value"] / of["trees"],
            "no_signal": 1 - of["full_useful"] / of["trees"],
        }


COLUMNS = {
    "saved": "saved %", "early": "early %", "kept_questions": "questions %", "kept_segments": "segments %",
    "square": "A^2 %", "along": "along %", "per_token": "per token", "bias": "bias", "variance": "variance",
}  # fmt: skip


def show(records: Sequence[dict[str, Any]], note: dict[str, Any]) -> Iterator[str]:
    """One plan's table in Markdown."""
    yield f"\n{note}\n"
    yield f"| option | stories | {' | '.join(COLUMNS.values())} |"
    yield "|---" * (2 + len(COLUMNS)) + "|"
    for record in records:
        cells = [record["option"], record["mix"]]
        for name, title in COLUMNS.items():
            value, error = record[name], record[f"{name}_error"]
            scale, digits = (100, 0) if title.endswith("%") else (1, 2)
            cells.append(
                "-" if value is None else f"{scale * value:.{digits}f} ± {scale * error:.{digits}f}"
            )
        yield f"| {' | '.join(cells)} |"
    for mix in MIXES:
        one = next(record for record in records if record["mix"] == mix)
        if one["questions"]:
            yield (
                f"{mix}: {one['questions']} questions, accuracy {one['accuracy']:.2f}, "
                f"full trees without any advantage {one['no_signal']:.0%}"
            )
