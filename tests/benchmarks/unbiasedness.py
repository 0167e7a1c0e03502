"""Does each algorithm's gradient point along the exact one, and how much of one batch's gradient is noise?

On a policy that can be enumerated (`tests/numerics/enumerable.py`: strings of up to six letters, a reward that two
letters decide, half of all tokens sure) the gradient of the mean reward is known exactly. Trees come from the real
sampler and go through the real algorithms, packing, mask, whitening and policy loss. Two tables:

1. Direction: the cosine of an algorithm's mean gradient to the exact one. By enumeration where the estimator is
   linear in the rewards (no sampling noise: 1.0000 is unbiased up to a factor), and measured over batches of
   4,000 sampled tokens with the mask and with whitening, noise taken out of its length; jackknife errors.
2. Noise: |E g|^2 / tr Cov(g) per 1,000 sampled tokens, value rollouts included, and the mean cosine of a single
   batch's gradient to the exact one, by the tokens sampled for the batch.

    python tests/benchmarks/unbiasedness.py [--tokens 240000] [--seed 0]
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

import torch  # noqa: E402 - after the path

from shared.wire import Plan  # noqa: E402
from tests.numerics.enumerable import STATES, Table  # noqa: E402
from tests.numerics.estimators import RHO, Estimator, estimators, expected_gradient  # noqa: E402
from tests.numerics.gradients import Packed, batch_gradient, cosine, packed, signal  # noqa: E402
from tests.numerics.table_engine import Sampled, sampled  # noqa: E402

BATCHES = (250, 1_000, 4_000, 16_000)
"""Sampled tokens of a batch."""
MASKS = {"all": None, "mask": RHO}


def pool(table: Table, plan: Plan, tokens: int, seed: int) -> list[Sampled]:
    """Trees of about so many sampled tokens."""
    pilot = asyncio.run(sampled(table, plan, 40, seed))
    per_tree = sum(one.tokens for one in pilot) / len(pilot)
    count = round(tokens / per_tree / table.questions) * table.questions
    return asyncio.run(sampled(table, plan, count, seed + 1_000))


def measure(table: Table, estimator: Estimator, trees: Sequence[Sampled]) -> dict[str, Any]:
    """One algorithm's numbers."""
    parts = [packed(estimator.segments(one.tree), rho=None) for one in trees]
    per_tree = sum(one.tokens for one in trees) / len(trees)
    record: dict[str, Any] = {"algorithm": estimator.name, "unbiased": estimator.unbiased}
    for name, rho in MASKS.items():
        exact = expected_gradient(table, estimator, rho)
        record[f"enumerated {name}"] = None if exact is None else cosine(exact, table.gradient)
        for tokens in BATCHES:
            found = gradients(table, parts, round(tokens / per_tree), rho, whiten=False)
            cosines = [cosine(g, table.gradient) for g in found if g.any()]
            record[f"cosine {name} {tokens}"] = float(np.sum(cosines) / len(found))
            if tokens == 1_000:
                squared, trace = signal(found @ found.T)
                record[f"signal {name}"] = squared / trace
        for whiten in (False, True):
            found = gradients(table, parts, round(4_000 / per_tree), rho, whiten=whiten)
            key = f"measured {name}{' white' if whiten else ''}"
            record[key] = direction(found, table.gradient)
            left_out = [
                direction(np.delete(found, i, 0), table.gradient) for i in range(len(found))
            ]
            record[f"error {key}"] = math.sqrt((len(found) - 1) * np.var(left_out))
    return record


def gradients(
    table: Table, parts: Sequence[Packed], size: int, rho: float | None, *, whiten: bool
) -> np.ndarray:
    """[batches, P] of independent batches of `size` trees, the same number of each question."""
    size = max(1, round(size / table.questions)) * table.questions
    found = []
    for start in range(0, len(parts) - size + 1, size):
        batch = Packed.joined(parts[start : start + size]).masked(rho)
        found.append(batch_gradient(table, batch.whitened() if whiten else batch))
    return np.array(found)


def direction(found: np.ndarray, exact: np.ndarray) -> float:
    """Cosine of the mean to the exact gradient, the mean's own noise taken out of its length."""
    squared, _ = signal(found @ found.T)
    return float(found.mean(0) @ exact / math.sqrt(max(squared, 1e-30) * (exact @ exact)))


def by_place(table: Table, estimator: Estimator) -> list[float]:
    """How much of the exact gradient the expected one holds at each letter's place, relative to the first."""
    mean = expected_gradient(table, estimator, None)
    assert mean is not None
    place = np.array([(state + 1).bit_length() - 1 for state in range(STATES)])
    shape = (table.questions, STATES, 3)
    mean, exact = mean.reshape(shape), table.gradient.reshape(shape)
    shares = []
    for at in range(max(place) + 1):
        here = (place == at)[None, :, None]
        shares.append(float((mean * exact * here).sum() / (exact * exact * here).sum()))
    return [share / shares[0] for share in shares]


def show(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Both tables in Markdown."""
    yield "Cosine of the mean gradient to the exact one\n"
    yield (
        "| algorithm | enumerated | with mask | measured | whitened | with mask | mask, whitened |"
    )
    yield "|---|---|---|---|---|---|---|"
    for r in records:
        cells = [r["algorithm"]]
        for key in ("enumerated all", "enumerated mask"):
            cells.append("-" if r[key] is None else f"{r[key]:.4f}")
        for key in ("all", "all white", "mask", "mask white"):
            error = r[f"error measured {key}"]
            cells.append(f"{r[f'measured {key}']:.3f} ± {error:.3f}")
        yield f"| {' | '.join(cells)} |"
    yield "\nOne batch: signal per 1,000 sampled tokens, and cosine to the exact gradient\n"
    for mask, text in (("all", "all tokens"), ("mask", f"mask, p < {RHO}")):
        yield f"| {text} | signal | " + " | ".join(f"{tokens:,}" for tokens in BATCHES) + " |"
        yield "|---" * (2 + len(BATCHES)) + "|"
        for r in records:
            cells = [r["algorithm"], f"{r[f'signal {mask}']:.3f}"]
            cells += [f"{r[f'cosine {mask} {tokens}']:.3f}" for tokens in BATCHES]
            yield f"| {' | '.join(cells)} |"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=240_000, help="sampled for each plan")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    table = Table.seeded(arguments.seed)
    records = []
    trees: dict[str, list[Sampled]] = {}
    for estimator in estimators(table):
        plan = estimator.plan.model_dump_json()
        if plan not in trees:
            trees[plan] = pool(
                table, estimator.plan, arguments.tokens, 10**9 * (arguments.seed + 1)
            )
        records.append(measure(table, estimator, trees[plan]))
        print(f"{estimator.name}: {time.process_time() - began:.0f} CPU s", file=sys.stderr)
    print(*show(records), sep="\n")
    places = {
        e.name: by_place(table, e)
        for e in estimators(table)
        if e.name.startswith("spo_tree") and e.expected
    }
    for name, shares in places.items():
        print(
            f"{name}, share of the exact gradient by place:", *(f"{share:.2f}" for share in shares)
        )
    seconds = round(time.process_time() - began, 1)
    print(json.dumps({"records": records, "places": places, "cpu_s": seconds}))


if __name__ == "__main__":
    main()
