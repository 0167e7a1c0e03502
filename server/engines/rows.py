"""The running rows of a batch: what each one samples, as tensors over rows.

A decode step reads and writes these tensors as a whole; Python looks at single rows only when they come and go.
"""

from collections.abc import Sequence

import torch

from server.engines.jobs import Sample
from server.engines.kv import lazy_zeros
from server.engines.sampling import signed64


class Rows:
    """State by row. Rows 0 to `span` - 1 run; free ones among them sample into the void.

    Args:
        rows: most rows.
        width: most tokens of a row, at least 2.
        device: where the tensors lie.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.tokens = lazy_zeros((rows, width), torch.int64, device)
        """[R, width] prompt, then sampled tokens."""
        self.logprobs = lazy_zeros((rows, width), torch.float32, device)
        """[R, width] float32, in the columns of the sampled tokens."""
        self._numbers = torch.zeros(rows, 6, dtype=torch.int64, device=device)
        self._factors = torch.ones(rows, 2, dtype=torch.float64, device=device)
        # Views, so that a row is written and moved in one go.
        self.length, self.limit, self.start, self.seed, self.top_k, self.live = (
            self._numbers.unbind(1)
        )
        self.temperature, self.top_p = self._factors.unbind(1)
        self.length.fill_(1)
        self.samples: list[Sample | None] = [None] * rows
        self.width = width
        self.span = 0
        self.count = 0

    def free(self, count: int) -> list[int]:
        """The first `count` free rows."""
        rows = (row for row, sample in enumerate(self.samples) if sample is None)
        return [row for row, _ in zip(rows, range(count), strict=False)]

    def running(self) -> list[int]:
        """Rows that hold a sample."""
        return [row for row in range(self.span) if self.samples[row] is not None]

    def put(self, rows: Sequence[int], samples: Sequence[Sample]) -> None:
        """Give rows to samples, prompts included."""
        numbers, factors = [], []
        for row, sample in zip(rows, samples, strict=True):
            request, prompt = sample.job.request, sample.prompt
            limit = min(len(prompt) + request.max_tokens, self.width)
            seed = signed64(request.seed + sample.index)
            numbers.append([len(prompt), limit, len(prompt), seed, request.top_k, 1])
            factors.append([request.temperature, request.top_p])
            self.samples[row] = sample
        device = self.tokens.device
        index = torch.tensor(rows, device=device)
        self._numbers[index] = torch.tensor(numbers, device=device)
        self._factors[index] = torch.tensor(factors, dtype=torch.float64, device=device)
        self.count += len(rows)
        self.span = max(self.span, max(rows) + 1)

    def write_prompt(self, rows: Sequence[int], prompt: Sequence[int]) -> None:
        """Write one prompt into rows that share it."""
        tokens = torch.tensor(prompt, device=self.tokens.device)
        self.tokens[list(rows), : len(prompt)] = tokens

    def drop(self, rows: Sequence[int]) -> None:
        """Free rows."""
        self.count -= len(rows)
        self._void(rows)

    def _void(self, rows: Sequence[int]) -> None:
        """Make rows harmless: they are computed until taken again, or until they are off the end."""
        for row in rows:
            self.samples[row] = None
        index = list(rows)
        self._numbers[index] = 0
        self.length[index] = 1
        self._factors[index] = 1.0
        while self.span and self.samples[self.span - 1] is None:
            self.span -= 1

    def holes(self) -> tuple[list[int], list[int]]:
        """Rows to move, and the free rows to move them to: afterwards none is free below `span`."""
        moving = [row for row in range(self.count, self.span) if self.samples[row] is not None]
        return moving, [row for row in range(self.count) if self.samples[row] is None]

    def move(self, sources: Sequence[int], targets: Sequence[int], extent: int) -> None:
        """Move rows with their first `extent` tokens."""
        source, target = list(sources), list(targets)
        for tensor in (self._numbers, self._factors):
            tensor[target] = tensor[source]
        for tensor in (self.tokens, self.logprobs):
            tensor[target, :extent] = tensor[source, :extent]
        for old, new in zip(source, target, strict=True):
            self.samples[new] = self.samples[old]
        self._void(source)
