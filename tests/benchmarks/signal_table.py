"""What blocks of gradients say of signal and noise, kept in a folder and shown; see `gradient_signal`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.numerics.gradients import signal

METRIC = "metric.npy"
"""In a folder of results: [P] what Adam would divide each parameter's gradient by."""
REFERENCES = ("rloo", "vineppo", "spo_tree even")
"""Unmasked and not whitened, their expectation is the gradient of the mean reward up to a factor."""


def ratio_with_error(gram: np.ndarray, blocks_per_batch: float) -> tuple[float, float]:
    """Signal of one batch and its standard error, by the jackknife."""

    def ratio(inner: np.ndarray) -> float:
        squared, trace = signal(inner)
        return squared / trace * blocks_per_batch

    left_out = [ratio(np.delete(np.delete(gram, i, 0), i, 1)) for i in range(len(gram))]
    spread = math.sqrt((len(gram) - 1) * np.var(left_out))
    return ratio(gram), spread


def keep(
    shape: str,
    gradients: Mapping[str, Sequence[np.ndarray]],
    counts: Mapping[str, float],
    folder: Path,
) -> None:
    """Write one plan's means, inner products and counts.

    Args:
        shape: the plan's name.
        gradients: [blocks] of [P] by variant.
        counts: what the plan's trees look like.
        folder: of the results; it has the metric.
    """
    arrays: dict[str, Any] = {}
    scale = np.load(folder / METRIC)
    for name, blocks in gradients.items():
        stacked = np.stack(blocks)
        arrays[f"mean {name}"] = stacked.mean(0)
        arrays[f"plain {name}"] = (stacked @ stacked.T).astype(np.float64)
        stacked /= scale
        arrays[f"adam {name}"] = (stacked @ stacked.T).astype(np.float64)
    arrays["counts"] = np.array(json.dumps(dict(counts)))
    np.savez(folder / f"{shape.replace(':', '_')}.npz", **arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One plan's results as they were written."""

    shape: str
    counts: dict[str, float]
    grams: dict[str, np.ndarray]
    """[B, B] inner products of blocks by variant, in one metric."""
    means: dict[str, np.ndarray]
    """[P] by variant, in the same metric."""

    @classmethod
    def load(cls, path: Path, metric: str, scale: np.ndarray | float) -> "Kept":
        """Read what `keep` wrote."""
        with np.load(path) as file:
            names = [key.removeprefix("mean ") for key in file.files if key.startswith("mean ")]
            return cls(
                shape=path.stem.replace("_", ":"),
                counts=json.loads(str(file["counts"])),
                grams={name: file[f"{metric} {name}"] for name in names},
                means={name: file[f"mean {name}"] / scale for name in names},
            )


def reference(others: Sequence[Kept]) -> tuple[np.ndarray, float] | None:
    """The mean of other plans' unbiased gradients, each by its precision, and its squared norm without noise."""
    chosen = []
    for kept in others:
        for name, mean in kept.means.items():
            if name in REFERENCES:
                squared, trace = signal(kept.grams[name])
                if squared > 0:
                    scale = 1 / math.sqrt(squared)
                    chosen.append((mean * scale, trace / squared / len(kept.grams[name])))
    if not chosen:
        return None
    weights = np.array([1 / noise for _, noise in chosen])
    weights /= weights.sum()
    mean = sum(weight * unit for weight, (unit, _) in zip(weights, chosen, strict=True))
    noise = sum(weight**2 * noise for weight, (_, noise) in zip(weights, chosen, strict=True))
    return np.asarray(mean), max(float(mean @ mean) - noise, 1e-30)


def table(folder: Path, batch_tokens: int) -> list[dict[str, Any]]:
    """One record for each plan and variant."""
    scale = np.load(folder / METRIC)
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for metric, by in (("adam", scale), ("plain", 1.0)):
        paths = sorted(path for path in folder.glob("*.npz"))
        everything = [Kept.load(path, metric, by) for path in paths]
        for kept in everything:
            target = reference([other for other in everything if other is not kept])
            block_tokens = (
                kept.counts["tokens_per_question"]
                * kept.counts["questions"]
                / kept.counts["blocks"]
            )
            for name, gram in kept.grams.items():
                record = records.setdefault((kept.shape, name), _counted(kept, name))
                value, error = ratio_with_error(gram, batch_tokens / block_tokens)
                record |= {f"{metric}_signal": value, f"{metric}_error": error}
                if target is not None and (squared := signal(gram)[0]) > 0:
                    direction = float(kept.means[name] @ target[0]) / math.sqrt(squared * target[1])
                    expected = direction * math.sqrt(max(value, 0) / (1 + max(value, 0)))
                    record |= {f"{metric}_direction": direction, f"{metric}_expected": expected}
    return list(records.values())


def _counted(kept: Kept, variant: str) -> dict[str, Any]:
    found = {key: value for key, value in kept.counts.items() if " " not in key}
    taking_part = kept.counts[f"participating {variant}"]
    return {"plan": kept.shape, "variant": variant, **found, "participating": taking_part}


def show(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table in Markdown."""
    yield (
        "| plan | variant | signal (Adam) | direction | expected cosine | signal (plain) | direction | "
        "expected cosine | tokens a question | segments with signal, of | questions without | tokens taking part "
        "| computed per sampled |"
    )
    yield "|---" * 13 + "|"
    for r in records:
        cells = [r["plan"], r["variant"]]
        for metric in ("adam", "plain"):
            cells.append(f"{r[f'{metric}_signal']:.2f} ± {r[f'{metric}_error']:.2f}")
            for key in ("direction", "expected"):
                cells.append(f"{r[f'{metric}_{key}']:.2f}" if f"{metric}_{key}" in r else "-")
        cells += [
            f"{r['tokens_per_question']:.0f}",
            f"{r['signal_segments']:.1f} of {r['segments']:.1f}",
            f"{r['no_signal']:.0%}",
            f"{r['participating']:.1%}",
            f"{r['computed']:.2f}",
        ]
        yield f"| {' | '.join(cells)} |"
