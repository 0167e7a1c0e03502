"""Keys and values of prompts: found in the store, computed where missing, copied to every row that needs them."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from server.engines.kv import RowCache
from server.engines.model import LanguageModel
from server.engines.prefixes import PrefixStore
from server.engines.rows import Rows

_CHUNK = 512
"""Most tokens of one row in one pass: bounds the scores, [rows, heads, chunk, length]."""
_PASS = 2048
"""Most tokens of one pass."""


class Prefill:
    """Brings rows to the point where one token is pending: all others have their keys and values.

    Args:
        model: computes them.
        cache: where they go.
        rows: whose tokens they are.
        store: where they may be already, and are kept.
    """

    def __init__(
        self, model: LanguageModel, cache: RowCache, rows: Rows, store: PrefixStore
    ) -> None:
        self._model, self._cache, self._rows, self._store = model, cache, rows, store
        self.passes = 0
        """Through the model so far."""

    def prompts(
        self, groups: Mapping[tuple[int, ...], Sequence[int]]
    ) -> dict[tuple[int, ...], int]:
        """Fill rows with all of their prompt but its last token, which the next decode step takes.

        Args:
            groups: rows by the prompt that they share; the prompts are in the rows already.

        Returns:
            For each prompt, how many tokens were computed, once for all its rows.
        """
        starts: dict[tuple[int, ...], int] = {}
        for prompt, rows in groups.items():
            at = 0
            for segment, count in self._store.match(prompt[:-1]):
                assert segment.states is not None, "only the root has no states"
                self._cache.write(rows, at, segment.states[..., :count, :])
                at += count
            if at < len(prompt) - 1:
                starts[prompt] = at
        self.extend(
            [groups[prompt][0] for prompt in starts],
            list(starts.values()),
            [len(prompt) - 1 for prompt in starts],
        )
        for prompt, start in starts.items():
            lead, *others = groups[prompt]
            self._cache.copy(lead, others, start, len(prompt) - 1)
            self._store.put(prompt[:-1], partial(self._cache.read, lead))
        return {prompt: len(prompt) - 1 - starts.get(prompt, len(prompt) - 1) for prompt in groups}

    def extend(self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> None:
        """Compute positions start to stop of each row, where everything before start is there."""
        # Long ones first, so that rows of like length share a pass and little is padded.
        parts = zip(rows, starts, stops, strict=True)
        work = sorted(
            ((stop - at, row, at, stop) for row, at, stop in parts if at < stop), reverse=True
        )
        while work:
            width = min(work[0][0], _CHUNK)
            batch, work = work[: _PASS // width], work[_PASS // width :]
            at = [start for _, _, start, _ in batch]
            ends = [stop for *_, stop in batch]
            while any(start < stop for start, stop in zip(at, ends, strict=True)):
                self._pass([row for _, row, *_ in batch], at, ends, width)
                at = [min(start + width, stop) for start, stop in zip(at, ends, strict=True)]

    def _pass(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int], width: int
    ) -> None:
        """Compute `width` positions of each row from start on; what reaches past stop repeats its last token."""
        device = self._rows.tokens.device
        index = torch.tensor(rows, device=device)
        columns = torch.arange(width, device=device)
        last = torch.tensor(stops, device=device)[:, None] - 1
        positions = torch.minimum(torch.tensor(starts, device=device)[:, None] + columns, last)
        tokens = self._rows.tokens[index].gather(1, positions)
        self._model.prefill(self._cache, index, tokens, positions, max(stops))
        self.passes += 1
