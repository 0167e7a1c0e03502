"""Requests in vLLM's words, and its answers in ours."""

import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from server.engines.base import Completion, EngineInfo, GenerateRequest, News
from server.engines.vllm_start import RequestOutput, RequestOutputKind, SamplingParams
from shared.errors import EngineError
from shared.tree import FinishReason

NEWS_TOKENS = 8
"""Tokens from one piece of news of a sample to the next: what a caller waits, against what telling it costs."""


def sampling_params(
    request: GenerateRequest, info: EngineInfo, first: int, samples: int
) -> SamplingParams:
    """vLLM's settings for samples `first` to `first + samples - 1` of a request."""
    return SamplingParams(
        n=samples,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed + first,  # vLLM's sample i draws from seed + i, as ours does
        max_tokens=request.max_tokens,
        # The end tokens of `info`, all of them and no others: vLLM would take the tokenizer's alone.
        ignore_eos=True,
        stop_token_ids=list(info.eos_token_ids),
        stop=list(request.stop),
        detokenize=bool(request.stop),
        logprobs=0,  # that of the sampled token, and no alternatives
        flat_logprobs=True,
        output_kind=(
            RequestOutputKind.CUMULATIVE if request.on_news else RequestOutputKind.FINAL_ONLY
        ),
        stream_interval=NEWS_TOKENS if request.on_news else None,
    )


async def final_output(
    stream: AsyncIterator[RequestOutput],
    on_news: Callable[[Sequence[News]], None] | None,
    first: int,
) -> RequestOutput:
    """The last output of a vLLM request, with all its samples. Cancelling aborts the request.

    Args:
        stream: gives the final output alone, or with `on_news` what each sample has so far.
        on_news: is told how samples grow.
        first: index of the first sample.
    """
    final: RequestOutput | None = None
    samples: dict[int, Any] = {}
    told: dict[int, int] = {}
    async for output in stream:  # to the end: a generator that is left half-way aborts its request
        final = output
        for sample in output.outputs:
            samples[sample.index] = sample
        if on_news is not None:
            on_news([_news(sample, told, first) for sample in output.outputs])
    if final is None:
        raise EngineError("vLLM ended a request without an answer")
    final.outputs = [samples[index] for index in sorted(samples)]
    return final


def _news(sample: Any, told: dict[int, int], first: int) -> News:  # noqa: ANN401 - vLLM's CompletionOutput
    """What a sample has grown by; `told`, tokens of each sample that are no news, is brought up to date."""
    start, end = told.get(sample.index, 0), len(sample.token_ids)
    told[sample.index] = end
    return News(
        sample=first + sample.index,
        token_ids=list(sample.token_ids[start:]),
        # vLLM's list goes on growing.
        logprobs=_logprobs(sample)[start:end],
    )


def _logprobs(sample: Any) -> list[float]:  # noqa: ANN401 - vLLM's CompletionOutput
    return [] if sample.logprobs is None else list(sample.logprobs.logprobs)


def completion(output: Any) -> Completion:  # noqa: ANN401 - vLLM's CompletionOutput
    """One finished sample.

    Raises:
        EngineError: it was finished by what we do not know, or its logprobs are no numbers.
    """
    if output.finish_reason not in set(FinishReason):
        raise EngineError(f"vLLM finished a request by {output.finish_reason!r}")
    logprobs = _logprobs(output)
    if not math.isfinite(sum(logprobs)):
        raise EngineError("the model gives logprobs that are not finite: push sound weights")
    return Completion(
        token_ids=list(output.token_ids),
        logprobs=logprobs,
        versions=[
            (int(span.version.removeprefix("v")), span.end - span.start)
            for span in output.weight_versions or ()
            if span.end > span.start
        ],
        finish_reason=FinishReason(output.finish_reason),
    )
