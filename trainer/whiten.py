"""Whitening: advantages to mean 0 and variance 1 over the participating tokens of a whole optimizer batch.

Never over a micro-batch, where magnitudes and signs are lost (DESIGN section 4): with two tokens of advantages
0.1 and 0.2 the first would push its token down.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trainer.packing import Row

VARIANCE_EPSILON = 1e-8


def whiten(
    advantages: NDArray[np.floating],
    participates: NDArray[np.bool_],
    response: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """(advantages - mean) / sqrt(variance + 1e-8), the variance unbiased.

    Always finite. One counted token has no variance, where the authors' code returns NaN everywhere: here every
    advantage is then 0, for a token that is its own mean is neither better nor worse than it. None counted
    gives zeros too.

    Args:
        advantages: [...] advantage of each token of the optimizer batch.
        participates: [...] the tokens that are counted.
        response: [...] the tokens that are counted where none participates; None for all.

    Returns:
        [...] every position shifted and scaled, also those that are not counted.

    >>> whiten(np.array([1.0, 3.0, 9.0]), np.array([True, True, False])).round(3).tolist()
    [-0.707, 0.707, 4.95]
    """
    counted = participates
    if not counted.any():
        counted = np.ones_like(participates) if response is None else response
    chosen = advantages[counted].astype(np.float64)
    if chosen.size < 2:
        return np.zeros(advantages.shape)
    scale = 1 / np.sqrt(chosen.var(ddof=1) + VARIANCE_EPSILON)
    return np.asarray((advantages.astype(np.float64) - chosen.mean()) * scale)


def whiten_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of one optimizer batch with their advantages whitened together; 0 where nothing trains."""
    if not rows:
        return []
    response = np.concatenate([row.response for row in rows])
    whitened = whiten(
        np.concatenate([row.advantages for row in rows]),
        np.concatenate([row.participates for row in rows]),
        response,
    )
    ends = np.cumsum([len(row.token_ids) for row in rows])[:-1]
    parts = np.split(np.where(response, whitened, 0.0), ends)
    return [replace(row, advantages=part) for row, part in zip(rows, parts, strict=True)]
