"""Drawing tokens: one uniform number per (stream, token index), inverted through the distribution.

A token depends on its stream's seed, its index and its logits alone: not on the rows beside it, not on how far
they are, not on a generator's state. That makes a request reproducible under any load.
"""

import math

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, odd, as a signed number
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def signed64(seed: int) -> int:
    """The int64 with the low 64 bits of `seed`, so that any Python integer names a stream.

    >>> signed64(2**64 - 1), signed64(7)
    (-1, 7)
    """
    return (seed + 2**63) % 2**64 - 2**63


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit flips each output bit half of the time."""
    # Tensor shifts keep the sign; the masks make them logical.
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _MIX_2
    return state ^ ((state >> 31) & (2**33 - 1))


def uniforms(seeds: Tensor, indices: Tensor) -> Tensor:
    """One number in [0, 1) per row, from a counter-based generator.

    The seed is mixed before the counter is added: else seeds that differ by the step would be one stream, shifted.

    Args:
        seeds: [N] int64 stream of each row.
        indices: [N] int64 index of the token in its stream.

    Returns:
        [N] float64 multiples of 2^-53.

    >>> uniforms(torch.tensor([1, 2, 1]), torch.tensor([0, 0, 1])).tolist()
    [0.6524484863740322, 0.27623358227789463, 0.7012121095215252]
    """
    bits = _mix(_mix(seeds * _WEYL) + (indices + 1) * _WEYL)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits with everything outside the top-k, then outside the top-p of what is left, at minus infinity.

    The token that crosses `top_p` is kept, and so is always the likeliest one. Ties are kept in token order.

    Args:
        logits: [N, V] float32, temperature applied.
        top_k: [N] int64, 0 is off.
        top_p: [N] float64 in (0, 1], 1 is off.

    Returns:
        [N, V] float32.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    outside = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    ordered = ordered.masked_fill(outside, -math.inf)
    probabilities = ordered.softmax(-1, dtype=torch.float64)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((top_p[:, None] < 1) & (before >= top_p[:, None]), -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token and its log-probability per row.

    Rows with temperature 0 take the likeliest token and its log-probability at temperature 1, truncation ignored.

    Args:
        logits: [N, V] any float type.
        uniform: [N] float64 in [0, 1).
        temperature: [N] float32, 0 is greedy.
        top_k: [N] int64, 0 is off; None is off for all rows.
        top_p: [N] float64 in (0, 1], 1 is off; None is off for all rows.

    Returns:
        [N] int64 tokens and [N] float32 log-probabilities of the distribution drawn from.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    if top_k is not None and top_p is not None:
        kept = truncate(scaled, top_k, top_p)
        scaled = torch.where(greedy[:, None], scaled, kept)
    logprobs = scaled.log_softmax(-1)
    # Float64, because the tail of a float32 sum over a large vocabulary would be lost.
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total: rounding up to it would draw past the last token with any probability.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    token = torch.where(greedy[:, None], logprobs.argmax(-1, keepdim=True), drawn)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]
