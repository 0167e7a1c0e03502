"""Requests in vLLM's words, and its answers in ours."""

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engines.base import Completion, EngineInfo, GenerateRequest, News
from server.engines.vllm_start import RequestOutput, RequestOutputKind, SamplingParams
from shared.errors import EngineError
from shared.tree import FinishReason

NEWS_TOKENS = 8
"""Tokens from one piece of news of a sample to the next: what a caller waits, against what telling it costs."""
AT_THE_END = 2**31 - 1
"""As `stream_interval`: vLLM tells of a sample's first token, and then of all others when it has ended."""


def sampling_params(
    request: GenerateRequest, info: EngineInfo, first: int, samples: int
) -> SamplingParams:
    """vLLM's settings for samples `first` to `first + samples - 1` of a request."""
    return SamplingParams(
        n=samples,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        # vLLM's sample i draws from seed + i, as ours does. Each stream is a generator, and a call in every step.
        seed=request.seed + first if request.reproducible else None,
        max_tokens=request.max_tokens,
        # The end tokens of `info`, all of them and no others: vLLM would take the tokenizer's alone.
        ignore_eos=True,
        stop_token_ids=list(info.eos_token_ids),
        stop=list(request.stop),
        detokenize=bool(request.stop),
        logprobs=0,  # that of the sampled token, and no alternatives
        flat_logprobs=True,
        # In deltas, because vLLM keeps to `stream_interval` in these alone.
        output_kind=RequestOutputKind.DELTA if _told(request) else RequestOutputKind.FINAL_ONLY,
        stream_interval=(NEWS_TOKENS if request.on_news else AT_THE_END)
        if _told(request)
        else None,
    )


def _told(request: GenerateRequest) -> bool:
    """Does the caller want to hear of samples before all have ended?"""
    return request.on_news is not None or request.on_completion is not None


@dataclass(slots=True)
class Grown:
    """One sample, grown from vLLM's deltas."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    weight_versions: Sequence[Any] = ()

    def add(self, delta: Any) -> None:  # noqa: ANN401 - vLLM's CompletionOutput
        """Add what vLLM has told: all of a sample, or its newest tokens."""
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(_logprobs(delta))
        self.finish_reason = delta.finish_reason
        self.weight_versions = delta.weight_versions or ()

    def completion(self) -> Completion:
        """The finished sample.

        Raises:
            EngineError: it was finished by what we do not know, or its logprobs are no numbers.
        """
        if self.finish_reason not in set(FinishReason):
            raise EngineError(f"vLLM finished a request by {self.finish_reason!r}")
        if not math.isfinite(sum(self.logprobs)):
            raise EngineError("the model gives logprobs that are not finite: push sound weights")
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            versions=[
                (int(span.version.removeprefix("v")), span.end - span.start)
                for span in self.weight_versions
                if span.end > span.start
            ],
            finish_reason=FinishReason(self.finish_reason),
        )


@dataclass(slots=True)
class Part:
    """One vLLM request: some of the samples of one of ours.

    Args:
        request: ours.
        first: index of its first sample in `request`.
    """

    request: GenerateRequest
    first: int
    samples: dict[int, Grown] = field(default_factory=dict)
    """By vLLM's index."""
    completions: dict[int, Completion] = field(default_factory=dict)
    """By index in `request`, as they end."""
    cached_tokens: int = 0
    """Prompt tokens that its first sample found in the cache."""

    async def read(self, stream: AsyncIterator[RequestOutput]) -> None:
        """Read vLLM's answer to its end, and tell of samples on the way. Cancelling aborts the request."""
        tell_news, tell_completion = self.request.on_news, self.request.on_completion
        async for (
            output
        ) in stream:  # to the end: a generator that is left half-way aborts its request
            if not self.samples:
                self.cached_tokens = output.num_cached_tokens or 0
            for delta in output.outputs:
                self.samples.setdefault(delta.index, Grown()).add(delta)
            if tell_news is not None:
                tell_news([self._news(delta) for delta in output.outputs])
            for delta in output.outputs:
                if delta.finish_reason is not None:
                    sample = self.first + delta.index
                    self.completions[sample] = self.samples[delta.index].completion()
                    if tell_completion is not None:
                        tell_completion(sample, self.completions[sample])
        if not self.completions:
            raise EngineError("vLLM ended a request without an answer")

    def _news(self, delta: Any) -> News:  # noqa: ANN401 - vLLM's CompletionOutput
        return News(
            sample=self.first + delta.index,
            token_ids=list(delta.token_ids),
            logprobs=_logprobs(delta),
        )


def _logprobs(output: Any) -> list[float]:  # noqa: ANN401 - vLLM's CompletionOutput
    return [] if output.logprobs is None else list(output.logprobs.logprobs)
