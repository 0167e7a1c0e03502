"""The vLLM engine: AsyncLLM in this process, the model in a process of its own."""

import asyncio
import contextlib
import importlib
import logging
from collections.abc import Coroutine, Iterator
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp

from server.engines import vllm_start
from server.engines.base import (
    ApplyReport,
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Weights,
)
from server.engines.requests import check_request
from server.engines.settings import EngineSettings
from server.engines.vllm_launch import Launch
from server.engines.vllm_process import VllmProcess, our_errors
from server.engines.vllm_requests import Part, sampling_params
from server.engines.vllm_start import AsyncLLM, tokens_input
from server.engines.vllm_transfer import VllmTransfer
from server.engines.vllm_weights import VllmWeights
from shared.errors import EngineError, SpokeError
from shared.threads import in_daemon_thread
from shared.transfer import TransferBackend

log = logging.getLogger("spoke.engine")

FIRST_SECONDS = 120.0
"""Longest wait for the first token, which may compile kernels."""
LAST_SECONDS = 3.0
"""Longest wait for an update that is under way when the engine is closed: its process may stand still."""


class VllmEngine:
    """`Engine` on vLLM. Belongs to the event loop that it was opened on."""

    def __init__(self, llm: AsyncLLM, info: EngineInfo, transfer: str | None = None) -> None:
        self._process = VllmProcess(llm)
        self._weights = VllmWeights(self._process)
        self.transfer = (
            None
            if transfer is None
            else VllmTransfer(self._process, self._weights, TransferBackend(transfer))
        )
        """Takes weights by broadcast, where it was opened for that; see `TakesTransfers`."""
        self._info = info
        self._running = 0

    async def prepare(self) -> None:
        """Prove that the model can be served, and how it can be updated; before the first request.

        Raises:
            EngineError: it cannot.
        """
        with our_errors():
            fault = await self._process.ask("spoke_open")
            if fault is not None:
                raise EngineError(f"vLLM cannot serve {self._info.model}: {fault}")
            log.info("vLLM is open; new weights go in by %s", await self._weights.prepare())
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self.check()  # some models load and fail at their first token
        except TimeoutError:
            raise EngineError(f"vLLM gave no first token in {FIRST_SECONDS:.0f} s") from None

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._info

    @property
    def version(self) -> int:
        """The weight version that the next token will be sampled with."""
        return self._weights.version

    @property
    def digest(self) -> str:
        """Digest of the weights that it holds; empty for the initial checkpoint."""
        return self._weights.digest

    @property
    def open_sequences(self) -> int:
        """Sequences that vLLM has not ended, by its own table; a request on its way there counts as one."""
        if not self._process.is_open:
            return 0
        table = self._llm.output_processor
        return max(self._running, int(table.get_num_unfinished_requests()))

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample `request.samples` continuations; see `Engine.generate`.

        The first sample is a vLLM request of its own and the others are a second one, because vLLM counts reused
        prompt tokens once a request: the first finds what was in its cache before, the others what the first left
        there. Of these the count of one stands for all.
        """
        llm = self._llm
        check_request(request, self._info)
        prompt = tokens_input(list(request.prompt_token_ids), cache_salt=self._weights.salt)
        # vLLM refuses several greedy samples: they would all be the same.
        distinct = 1 if request.temperature == 0.0 else request.samples
        sizes = [(0, 1), (1, distinct - 1)] if distinct > 1 else [(0, 1)]
        parts = [Part(request, first) for first, _ in sizes]
        with self._busy(), our_errors():
            reads = [
                part.read(
                    llm.generate(
                        prompt,
                        sampling_params(request, self._info, first, samples),
                        request_id=uuid4().hex,
                        priority=request.priority,
                    )
                )
                for part, (first, samples) in zip(parts, sizes, strict=True)
            ]
            await self._process.while_alive(_all(*reads))
        reused = sum(part.cached_tokens * len(part.completions) for part in parts)
        completions = {i: done for part in parts for i, done in part.completions.items()}
        if request.on_completion is not None:
            for copy in range(distinct, request.samples):
                request.on_completion(copy, completions[0])
        return GenerateResult(
            completions=[completions[min(i, distinct - 1)] for i in range(request.samples)],
            computed_prefill_tokens=len(request.prompt_token_ids) * distinct - reused,
            cached_tokens=reused,
        )

    async def load_weights(self, weights: Weights) -> ApplyReport:
        """Swap in new weights between two decode steps; see `Engine.load_weights`."""
        return await self._weights.load(weights)

    async def live_digests(self, dtype: str) -> dict[str, str]:
        """SHA-256 of every parameter in memory, by checkpoint name; see `Engine.live_digests`."""
        return await self._weights.live_digests(dtype)

    async def check(self) -> None:
        """Prove that the engine answers: by a token where it is idle, by a word from the worker where it is not.

        A token asked of a full engine would wait for its turn and say nothing; the worker answers between two
        decode steps, also while sampling is paused. Writing new weights keeps it from answering: that is a sign of
        life, also where it begins after the question; it has a bound of its own, beyond which vLLM is given up.

        Raises:
            EngineError: vLLM's process is gone, or was given up. Silence has no bound here: set one.
        """
        with our_errors():
            await self._llm.check_health()
            swap = asyncio.ensure_future(self._weights.in_pause.wait())
            sign = asyncio.ensure_future(self._sign())
            try:
                await asyncio.wait({sign, swap}, return_when=asyncio.FIRST_COMPLETED)
                if sign.done():
                    return sign.result()
            finally:
                for task in (sign, swap):
                    task.cancel()
                await asyncio.gather(sign, swap, return_exceptions=True)

    async def _sign(self) -> None:
        """A token, or a word from the worker; nothing is asked of a worker that a swap has."""
        if self._weights.in_pause.is_set():
            await asyncio.Future()
        if self._running or self._weights.updating:
            await self._process.ask("spoke_path")
            return
        await self.generate(
            GenerateRequest(prompt_token_ids=(0,), samples=1, max_tokens=1, temperature=0.0, seed=0)
        )

    async def died(self) -> EngineError:
        """Wait until vLLM's process is gone, or a write of weights has failed it; see `Engine.died`."""
        return await self._process.died()

    async def openai_app(self, name: str) -> ASGIApp:
        """vLLM's own OpenAI routes on this engine; see `SpeaksOpenAI.openai_app`."""
        # Seconds of imports that an engine alone does not need.
        await in_daemon_thread(importlib.import_module, "server.engines.vllm_openai")
        from server.engines.vllm_openai import GuardedLLM, openai_app

        guarded = GuardedLLM(self._llm, self._info, self._process.while_alive, self._busy)
        return await openai_app(guarded, self._info, name)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def close(self) -> None:
        """End vLLM's process and its task on this loop. A second call does nothing."""
        await self._weights.ended(LAST_SECONDS)
        self._process.give_up("the engine is closed")  # whoever still waits for it is told
        await self._process.close()

    @property
    def _llm(self) -> AsyncLLM:
        return self._process.llm


async def open_engine(settings: EngineSettings) -> VllmEngine:
    """Start vLLM, which takes 8 seconds to minutes; the event loop goes on meanwhile. Cancelling ends it.

    Raises:
        ConfigError: no such checkpoint, device, number format or limit.
        EngineError: vLLM does not run here, or cannot serve this checkpoint.
    """
    try:
        llm, info = await Launch().start(settings)
    except SpokeError:
        raise
    except Exception as error:  # vLLM's start raises every kind of error; the caller needs one line
        line = vllm_start.reason(error)
        raise EngineError(f"vLLM did not start {settings.model}: {line}") from error
    engine = VllmEngine(llm, info, settings.weight_transfer)
    try:
        await engine.prepare()
    except BaseException:
        await engine.close()
        raise
    return engine


async def _all(*reads: Coroutine[Any, Any, None]) -> None:
    """Read every part to its end; where one fails the others end too, so that none samples on for nobody."""
    tasks = [asyncio.ensure_future(read) for read in reads]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
