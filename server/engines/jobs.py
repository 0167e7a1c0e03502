"""Requests on their way through a batch, and the continuations that they are made of."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from server.engines.base import Completion, GenerateRequest, GenerateResult, News
from shared.errors import EngineError
from shared.tree import FinishReason


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way."""

    request: GenerateRequest
    future: Future[GenerateResult] = field(default_factory=Future)
    completions: dict[int, Completion] = field(default_factory=dict)
    """By sample index, as they finish."""
    tell: Callable[[Sequence[News]], None] | None = None
    """Hands news of the samples to the caller, from any thread; None where nobody asked for them."""
    tell_completion: Callable[[int, Completion], None] | None = None
    """Hands samples to the caller as they end, from any thread; None where nobody asked for them."""
    broken: bool = False
    """Did the model give logprobs that are no numbers?"""
    computed_tokens: int = 0
    cached_tokens: int = 0

    def finish(self) -> None:
        """Answer with all completions once they are there, unless the caller has gone."""
        if len(self.completions) < self.request.samples:
            return
        if self.broken:
            self.fail(EngineError("the model gives no numbers as logits: push sound weights"))
            return
        result = GenerateResult(
            completions=[self.completions[index] for index in range(self.request.samples)],
            computed_prefill_tokens=self.computed_tokens,
            cached_tokens=self.cached_tokens,
        )
        with suppress(InvalidStateError):  # cancelled meanwhile, from the other thread
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless the caller has gone."""
        with suppress(InvalidStateError):  # cancelled meanwhile, from the other thread
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class Sample:
    """One continuation of a job: waits, then holds a row."""

    job: Job
    index: int
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(weight version, tokens) up to the last weight update."""
    told: int = 0
    """Sampled tokens that the caller has had news of."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """[P] the request's tokens."""
        return self.job.request.prompt_token_ids

    def seal(self, length: int, version: int) -> None:
        """Note that all tokens up to here, prompt included, are of `version` or older."""
        sampled = length - len(self.prompt) - sum(count for _, count in self.spans)
        self.spans.append((version, sampled))

    def complete(
        self, tokens: list[int], logprobs: list[float], version: int, reason: FinishReason
    ) -> None:
        """Hand over what was sampled, the last of it by `version`; the job's last sample answers the request."""
        self.seal(len(self.prompt) + len(tokens), version)
        done = Completion(
            token_ids=tokens,
            logprobs=logprobs,
            versions=_merged(self.spans),
            finish_reason=reason,
        )
        self.job.completions[self.index] = done
        self.job.broken |= any(map(math.isnan, logprobs))
        if self.job.tell_completion is not None and not self.job.broken:
            self.job.tell_completion(self.index, done)
        self.job.finish()


def _merged(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without empty ones, neighbours of one version as one.

    >>> _merged([(0, 3), (1, 0), (0, 2)])
    [(0, 5)]
    """
    merged: list[tuple[int, int]] = []
    for version, count in runs:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        elif count:
            merged.append((version, count))
    return merged
