"""When does segment credit pay? Signal per sampled token on a toy whose regime can be set, against RLOO's.

A response has T tokens, two to choose from at each place, and one logit a place. `decisive` places, evenly
spread, must all be right for a reward of 1; of the others, `uncertain` are coin flips that change nothing, such
as a choice of words. Values are known in closed form: a rollout is a binomial draw, and the exact critic is free.

Printed for each regime, for batches of equal sampled tokens (value rollouts included):

    signal      |E g|^2 / tr Cov(g), divided by that of RLOO with groups of 8
    direction   cosine of E g to the gradient of the mean reward, where it is not 1

`exact critic` is perfect credit for free. It gains little where all uncertain tokens are decisive and mistakes
few, for a response then has about one reason to fail and its reward names it. It gains much where most uncertain
tokens are irrelevant, since RLOO credits all of them with the reward's noise.

    python tests/benchmarks/credit_regimes.py [--trees 4000]
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

GROUP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A task."""

    tokens: int
    decisive: int
    uncertain: int
    """Irrelevant coin flips among the other places."""
    success: float
    """Mean reward."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A regime's tables, by place."""

    right: np.ndarray
    """[T] probability of the right, or the first, token."""
    needed: np.ndarray
    """[T] true at decisive places."""
    rest: np.ndarray
    """[T + 1] probability that all decisive places from here on come out right."""

    @classmethod
    def of(cls, regime: Regime) -> "Task":
        """Decisive places evenly spread, uncertain ones at random, all others sure."""
        places = np.arange(regime.tokens)
        decisive = np.linspace(0, regime.tokens - 1, regime.decisive).round().astype(int)
        others = np.setdiff1d(places, decisive)
        right = np.ones(regime.tokens)
        right[np.random.default_rng(1).choice(others, regime.uncertain, replace=False)] = 0.5
        right[decisive] = regime.success ** (1 / regime.decisive)
        needed = np.isin(places, decisive)
        rest = np.append(np.cumprod(np.where(needed, right, 1.0)[::-1])[::-1], 1.0)
        return cls(right=right, needed=needed, rest=rest)

    @property
    def gradient(self) -> np.ndarray:
        """[T] of the mean reward, by the logits."""
        return np.where(self.needed, self.rest[0] * (1 - self.right), 0.0)

    def well(self, sampled: np.ndarray) -> np.ndarray:
        """[..., T + 1] is the response still right before each place, and at its end?"""
        still = (sampled | ~self.needed).cumprod(-1)
        return np.concatenate([np.ones((*still.shape[:-1], 1)), still], -1)


def group(
    task: Task, count: int, rng: np.random.Generator, *, exact: bool
) -> tuple[np.ndarray, float]:
    """([count, T] gradients of groups, tokens sampled for each), with leave-one-out or exact credit."""
    sampled = rng.random((count, GROUP, len(task.right))) < task.right
    well = task.well(sampled)
    if exact:
        credit = np.diff(well * task.rest, axis=-1)
    else:
        rewards = well[..., -1]
        others = (rewards.sum(1, keepdims=True) - rewards) / (GROUP - 1)
        credit = (rewards - others)[..., None]
    return (credit * (sampled - task.right)).sum(1), GROUP * len(task.right)


def chain(
    task: Task, count: int, rng: np.random.Generator, *, segments: int, rollouts: int
) -> tuple[np.ndarray, float]:
    """The same for one response with rollouts from the start of each segment of equal length."""
    length = len(task.right)
    sampled = rng.random((count, length)) < task.right
    well = task.well(sampled)
    ends = [round(length * place / segments) for place in range(segments + 1)]
    values = [rng.binomial(rollouts, well[:, at] * task.rest[at]) / rollouts for at in ends[:-1]]
    values.append(well[:, -1])
    credit = np.zeros(sampled.shape)
    for place, (start, end) in enumerate(pairwise(ends)):
        credit[:, start:end] = (values[place + 1] - values[place])[:, None]
    return credit * (sampled - task.right), length + sum(
        rollouts * (length - at) for at in ends[:-1]
    )


def tree(
    task: Task, count: int, rng: np.random.Generator, *, factors: tuple[int, ...], even: bool
) -> tuple[np.ndarray, float]:
    """The same for trees of segments of equal length, as they are or weighted without bias."""
    length, depths = len(task.right), len(factors)
    ends = [round(length * depth / depths) for depth in range(depths + 1)]
    well, sampled, alive = np.ones(count, bool), [], []
    for depth, (start, end) in enumerate(pairwise(ends)):
        shape = (count, *factors[: depth + 1], end - start)
        sampled.append(rng.random(shape) < task.right[start:end])
        well = well[..., None] & (sampled[-1] | ~task.needed[start:end]).all(-1)
        alive.append(well)
    values = [alive[-1].astype(float)]
    while values[0].ndim > 1:
        values.insert(0, values[0].mean(-1))
    gradient, nodes, tokens = np.zeros((count, length)), 1, 0
    for depth, (start, end) in enumerate(pairwise(ends)):
        siblings, nodes = factors[depth], nodes * factors[depth]
        credit = values[depth + 1] - values[depth][..., None]
        weight = siblings / (siblings - 1) / nodes if even else 1.0
        scores = credit[..., None] * (sampled[depth] - task.right[start:end])
        gradient[:, start:end] = weight * scores.reshape(count, nodes, end - start).sum(1)
        tokens += nodes * (end - start)
    return gradient, tokens


def measure(regime: Regime, trees: int, seed: int) -> dict[str, tuple[float, float]]:
    """(signal per sampled token, direction) of each estimator."""
    task = Task.of(regime)
    rng = np.random.default_rng(seed)
    found = {
        f"rloo {GROUP}": group(task, trees, rng, exact=False),
        "exact critic": group(task, trees, rng, exact=True),
    }
    for segments, rollouts in ((3, 3), (3, 9), (12, 3), (12, 9)):
        name = f"chain, {segments} segments, N={rollouts}"
        found[name] = chain(task, trees * 4, rng, segments=segments, rollouts=rollouts)
    for factors in ((4, 2, 2), (4, 4, 4), (6, 6, 6)):
        for even in (False, True):
            name = f"tree {'-'.join(map(str, factors))}{', even' if even else ''}"
            found[name] = tree(task, trees, rng, factors=factors, even=even)
    return {name: judged(task, *made) for name, made in found.items()}


def judged(task: Task, gradients: np.ndarray, tokens: float) -> tuple[float, float]:
    """Signal per sampled token, and cosine of the mean to the exact gradient, without the mean's own noise."""
    mean, exact = gradients.mean(0), task.gradient
    trace = gradients.var(0, ddof=1).sum()
    squared = mean @ mean - trace / len(gradients)
    direction = mean @ exact / math.sqrt(max(squared, 1e-30) * (exact @ exact))
    return float(squared / trace / tokens), float(direction)


REGIMES = (
    Regime(tokens=75, decisive=5, uncertain=0, success=0.45),
    Regime(tokens=75, decisive=5, uncertain=2, success=0.45),
    Regime(tokens=75, decisive=5, uncertain=8, success=0.45),
    Regime(tokens=75, decisive=5, uncertain=30, success=0.45),
    Regime(tokens=300, decisive=5, uncertain=60, success=0.45),
    Regime(tokens=300, decisive=20, uncertain=60, success=0.45),
    Regime(tokens=300, decisive=5, uncertain=0, success=0.05),
    Regime(tokens=300, decisive=5, uncertain=60, success=0.05),
    Regime(tokens=300, decisive=5, uncertain=60, success=0.95),
)


def show(results: dict[Regime, dict[str, tuple[float, float]]]) -> Iterator[str]:
    """A table in Markdown: regimes across, estimators down."""
    for name in ("tokens", "decisive", "uncertain", "success"):
        yield f"| {name} | " + " | ".join(str(getattr(regime, name)) for regime in results) + " |"
        if name == "tokens":
            yield "|---" * (len(results) + 1) + "|"
    first, *_ = results.values()
    for name in first:
        cells = []
        for found in results.values():
            value, direction = found[name]
            relative = value / found[f"rloo {GROUP}"][0]
            cells.append(f"{relative:.2f}" + (f" ({direction:.2f})" if direction < 0.97 else ""))
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = {regime: measure(regime, arguments.trees, arguments.seed) for regime in REGIMES}
    print(*show(results), sep="\n")
    records = [
        {name: getattr(regime, name) for name in regime.__slots__} | {"estimators": found}
        for regime, found in results.items()
    ]
    print(json.dumps(records))


if __name__ == "__main__":
    main()
