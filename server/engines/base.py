"""The seam between the service and whatever samples tokens.

An engine takes token ids and gives token ids. It knows nothing of trees, text or rewards. Logprobs are of the
distribution sampled from: temperature applied, renormalised where top-k or top-p truncates it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from starlette.types import ASGIApp

from shared.errors import EngineError
from shared.transfer import TransferBackend, TransferGroup, TransferOffer
from shared.tree import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is and where its limits lie."""

    engine: str
    """`vllm` or `transformers`."""
    model: str
    """Directory or hub id of the checkpoint."""
    dtype: str
    """`float32` or `bfloat16`."""
    device: str
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt plus response."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a response; sampled, scored and returned like any other."""
    max_batch: int
    """Most sequences that run at once; the others wait inside the engine."""
    kv_tokens: int
    """Tokens whose keys and values fit the engine's memory at once, shared prefixes counted once."""
    block_tokens: int
    """Tokens that the cache shares and reuses as one: of a reused prefix, at most so many are computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Tokens that one sample has grown by since it was last told of."""

    sample: int
    """Index among the request's samples."""
    token_ids: list[int]
    logprobs: list[float]
    """Behaviour log-probability (nats) of each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """`samples` continuations of one token prefix."""

    prompt_token_ids: tuple[int, ...]
    """[P] at least one token, each below `vocab_size`; P < `max_model_len`."""
    samples: int
    max_tokens: int
    """Most tokens of each continuation; cut further where the context ends."""
    temperature: float
    """0 is greedy; logprobs are then those at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    seed: int
    """Sample i draws from the stream `seed + i`: callers space the seeds of different requests."""
    reproducible: bool = True
    """Whether the same request must give the same tokens again; where not, an engine may leave the streams aside
    for a common one, which is quicker in vLLM."""
    stop: tuple[str, ...] = ()
    """A hint: an engine may stop early once a stop string is complete; the sampler trims for certain."""
    on_news: Callable[[Sequence[News]], None] | None = None
    """Called on the event loop every few tokens, in order, and never after the result. The result has all that was
    told of, and what was not: the last tokens, say, or the copies of a greedy sample."""
    on_completion: Callable[[int, "Completion"], None] | None = None
    """Called on the event loop with (sample, its completion) as each one ends, while its siblings go on; every
    sample exactly once, before the result."""
    priority: int = 0
    """Where requests wait, lower goes first; equal ones in the order they came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One continuation."""

    token_ids: list[int]
    """[T] the end token included, where one was sampled."""
    logprobs: list[float]
    """[T] behaviour log-probability (nats) of each token."""
    versions: list[tuple[int, int]]
    """Run-length spans (weight version, token count); the counts add up to T."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """All continuations of one request, in the order of their streams."""

    completions: list[Completion]
    computed_prefill_tokens: int
    """Prompt tokens that went through the model for this request."""
    cached_tokens: int
    """Prompt tokens whose keys and values were reused, summed over the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One exact set of weights, verified, on this machine's disk: all of it, or what changed."""

    version: int
    digest: str
    """Digest of every tensor's name, dtype, shape and bytes; salts the prefix cache."""
    files: tuple[Path, ...]
    """safetensors shards in checkpoint (Hugging Face) names, every parameter exactly once; tied ones once.

    With `base_digest`, patch files: for each tensor that changed `NAME.indices` ([n] int32, or int64 where the
    tensor needs it: ascending places in the flattened tensor) and `NAME.values` ([n] the new values)."""
    base_digest: str | None = None
    """Digest of the weights that a patch is for, which must be the engine's own; None for a full set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyReport:
    """Seconds of one weight update."""

    stage_s: float = 0.0
    """Before the pause, while tokens were sampled: how long files were read and checked."""
    pause_s: float
    """How long no token was sampled."""
    apply_s: float
    """Of these, how long tensors were written."""


class Engine(Protocol):
    """Samples continuations and takes new weights while it runs. Everything runs on one event loop."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        ...

    @property
    def version(self) -> int:
        """The weight version that the next token will be sampled with; 0 is the initial checkpoint."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the weights that it holds, as `Weights` named it; empty for the initial checkpoint."""
        ...

    @property
    def open_sequences(self) -> int:
        """Sequences that run or wait in the engine now, whoever asked for them; 0 when it is idle."""
        ...

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample `request.samples` continuations. Cancelling the task aborts them in the engine.

        Raises:
            RequestError: the request does not fit the engine (empty prompt, unknown token, no room).
            EngineError: the engine failed.
        """
        ...

    async def load_weights(self, weights: Weights) -> ApplyReport:
        """Swap in new weights between two decode steps.

        Running requests go on afterwards: tokens before the swap are the old version's, tokens after it the new
        one's, computed from keys and values of the new weights only. All or nothing: on an error the old weights
        stay and serve.

        Raises:
            NeedsFullError: a patch for other weights than the engine's, or for an engine that takes none.
            WeightsError: a tensor is missing, unknown, or has another shape, or writing failed and was undone.
            EngineError: the engine failed, or writing did and could not be undone: it never samples again.
        """
        ...

    async def live_digests(self, dtype: str) -> dict[str, str]:
        """SHA-256 of every parameter as it stands in the engine's memory now, by checkpoint name.

        Args:
            dtype: `float32` or `bfloat16`, that the bytes are hashed in: the published format.

        Raises:
            EngineError: the engine failed, or cannot tell its parameters apart by checkpoint names.
        """
        ...

    async def check(self) -> None:
        """Prove that the engine still answers, at the cost of one token at most.

        Raises:
            EngineError: it does not.
        """
        ...

    async def died(self) -> EngineError:
        """Wait until the engine can never answer again; returns why. For ever, where nothing happens to it."""
        ...

    async def close(self) -> None:
        """Free the model and end every process and thread that the engine started."""
        ...


@runtime_checkable
class SpeaksOpenAI(Protocol):
    """An engine with OpenAI-compatible routes of its own."""

    async def openai_app(self, name: str) -> ASGIApp:
        """The routes `/v1/models`, `/v1/completions` and `/v1/chat/completions`, on this engine and its weights.

        Args:
            name: by which requests call the model.
        """
        ...


class Transfer(Protocol):
    """An engine's place in a group that a trainer broadcasts weights to."""

    @property
    def backend(self) -> TransferBackend:
        """Of the groups that it can join."""
        ...

    @property
    def verifies(self) -> bool:
        """Can it hash what it holds, as `TransferOffer.verify` asks?"""
        ...

    @property
    def joined(self) -> bool:
        """Is it in a group, as far as it knows?"""
        ...

    async def join(self, group: TransferGroup) -> None:
        """Meet the trainer and the other engines; see `VllmTransfer.join`."""
        ...

    def check(self, offer: TransferOffer) -> None:
        """Raise WeightsError where a version could not be received now."""
        ...

    async def receive(self, offer: TransferOffer) -> ApplyReport:
        """Take a version from the group between two decode steps; see `VllmTransfer.receive`."""
        ...

    async def leave(self) -> None:
        """Leave the group; the engine serves on."""
        ...


@runtime_checkable
class TakesTransfers(Protocol):
    """An engine whose weights may come by broadcast."""

    transfer: Transfer | None
    """None where it was not opened for that."""


def transfer_of(engine: Engine) -> Transfer | None:
    """An engine's place in a transfer group; None where its weights do not come so."""
    return engine.transfer if isinstance(engine, TakesTransfers) else None


def spans(versions: Iterable[int]) -> list[tuple[int, int]]:
    """Run-length spans of per-token versions.

    >>> spans([3, 3, 4])
    [(3, 2), (4, 1)]
    """
    runs: list[tuple[int, int]] = []
    for version in versions:
        if runs and runs[-1][0] == version:
            runs[-1] = (version, runs[-1][1] + 1)
        else:
            runs.append((version, 1))
    return runs
