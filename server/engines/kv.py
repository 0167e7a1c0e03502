"""The keys and values of all rows of a batch, and the attention that reads them where they lie.

Rows have lengths of their own. Nothing is padded or moved from step to step: each forward pass writes at every
row's own position and attends up to it, so a decode step touches [rows, longest row] and not [rows, capacity].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

ATTENTION = "spoke_grouped"
"""The name under which transformers finds `grouped_attention`."""

_LINE = 64
"""Bytes of a cache line: where tensors should begin."""
_ALIGN = 8
"""Columns are attended over in multiples of this: one vector of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShape:
    """What one token leaves behind in a model: `layers` pairs of [heads, dim]."""

    layers: int
    heads: int
    """Key-value heads."""
    dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize


class RowCache(Cache):
    """Keys and values by row and position.

    Fresh memory is zero, because what the mask hides still takes part as 0 * value.

    Args:
        shape: what a token leaves behind.
        rows: rows to make room for.
        capacity: tokens to make room for in each.
        device: where.
    """

    def __init__(self, shape: StateShape, rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.shape = shape
        self.device = device
        self._states = torch.empty(0)
        self.resize(rows, capacity)

    def resize(self, rows: int, capacity: int, used_rows: int = 0, used: int = 0) -> None:
        """Allocate anew, keeping the first `used` positions of the first `used_rows` rows."""
        kept = self._states[:, :, :used_rows, :, :used] if used_rows else None
        if kept is None:
            # The old ones go before the new ones come.
            self._states = self._flat = torch.empty(0)
        size = (self.shape.layers, 2, rows, self.shape.heads, capacity, self.shape.dim)
        states = lazy_zeros(size, self.shape.dtype, self.device)
        if kept is not None:
            states[:, :, :used_rows, :, :used] = kept
        self.rows, self.capacity = rows, capacity
        self._states = states
        self._flat = states.view(self.shape.layers, 2, -1, self.shape.dim)
        self._head = torch.arange(self.shape.heads, device=self.device)[:, None]
        self._columns = torch.arange(capacity, device=self.device)

    def aim(self, positions: Tensor, extent: int, rows: Tensor | None = None) -> Tensor:
        """Say where the next forward pass writes and reads.

        Args:
            positions: [N, Q] int64 position of each query token in its row.
            extent: columns to attend over at least: more than the largest position.
            rows: [N] int64 rows; None for the first N.

        Returns:
            [N, 1, Q, L] additive mask, L at least the extent: a query sees its own position and those before it.
        """
        extent = min(-(-extent // _ALIGN) * _ALIGN, self.capacity)
        self._extent, self._count, self._rows = extent, positions.shape[0], rows
        row = torch.arange(self._count, device=self.device) if rows is None else rows
        slots = (row[:, None, None] * self.shape.heads + self._head) * self.capacity
        self._targets = (slots + positions[:, None, :]).flatten()
        hidden = self._columns[:extent] > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self.shape.dtype, device=self.device)
        return mask.masked_fill_(hidden, -torch.inf)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [N, heads, Q, dim] of one layer; returns [N, heads, L, dim] keys and values of the rows."""
        # A padded query repeats its row's last token: equal values land on one place, in whatever order.
        for which, new in enumerate((key_states, value_states)):
            self._flat[layer_idx, which].index_copy_(
                0, self._targets, new.reshape(-1, self.shape.dim)
            )
        layer = self._states[layer_idx, :, :, :, : self._extent]
        if self._rows is None:
            keys, values = layer[:, : self._count]
        else:
            keys, values = layer.index_select(1, self._rows)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: rows have lengths of their own, and every pass brings its positions."""
        return 0

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """[layers, 2, heads, stop - start, dim] of one row, copied."""
        return self._states[:, :, row, :, start:stop].clone()

    def write(self, rows: Sequence[int], start: int, states: Tensor) -> None:
        """Put [layers, 2, heads, T, dim] at `start` of each of `rows`."""
        stop = start + states.shape[-2]
        for row in rows:
            self._states[:, :, row, :, start:stop] = states

    def copy(self, source: int, rows: Sequence[int], start: int, stop: int) -> None:
        """Copy positions start to stop of one row to others."""
        self.write(rows, start, self._states[:, :, source, :, start:stop])

    def move(self, source: Tensor, target: Tensor, extent: int) -> None:
        """Copy the first `extent` positions of rows `source` [N] to rows `target` [N], which are others."""
        states = self._states[:, :, :, :, :extent]
        states[:, :, target] = states[:, :, source]


def lazy_zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take no memory before they are written, where `torch.zeros` would write them all."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    count = math.prod(size) * dtype.itemsize
    memory = np.zeros(count + _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory)[start : start + count].view(dtype).view(tuple(size))


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention of query heads in groups that share a key-value head, without repeating keys and values.

    A decode step is bound by reading keys and values; the stock paths copy them once more for each query head.

    Args:
        module: the attention module.
        query: [N, H, Q, dim].
        key: [N, heads, L, dim], where heads divides H.
        value: [N, heads, L, dim].
        attention_mask: [N, 1, Q, L] additive.
        scaling: factor of the scores; None is dim^-1/2.
        dropout: must be 0.
        options: what other kinds of attention take; anything that would change the result is refused.

    Returns:
        [N, Q, H, dim] and None for the attention weights.

    Raises:
        NotImplementedError: the model asks for soft-capped scores, sinks or a position bias.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    assert dropout == 0.0, "the engine never trains"
    rows, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, -1, groups * queries, dim)
    scores = (grouped @ key.transpose(2, 3)).view(rows, -1, groups, queries, key.shape[2])
    # Scaled in float32: in bfloat16 the factor itself would round the scores.
    scores = torch.add(attention_mask[:, :, None], scores.float(), alpha=scale)
    weights = scores.softmax(-1, dtype=torch.float32)
    mixed = weights.to(value.dtype).view(rows, -1, groups * queries, key.shape[2]) @ value
    return mixed.view(rows, heads, queries, dim).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)
