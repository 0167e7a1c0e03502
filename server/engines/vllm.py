"""The vLLM engine: AsyncLLM in this process, the model in a process of its own."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any, TypeVar
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
from server.engines.vllm_requests import Part, sampling_params
from server.engines.vllm_start import (
    AsyncLLM,
    VLLMClientError,
    tokens_input,
)
from shared.errors import EngineError, RequestError, SpokeError, WeightsError

log = logging.getLogger("spoke.engine")
T = TypeVar("T")

FIRST_SECONDS = 120.0
"""Longest wait for the first token, which may compile kernels."""
SWAP_SECONDS = 600.0
"""How long a swap of weights, which keeps the worker from answering, is taken for a sign of life."""


class VllmEngine:
    """`Engine` on vLLM. Belongs to the event loop that it was opened on."""

    def __init__(self, llm: AsyncLLM, info: EngineInfo) -> None:
        self._opened: AsyncLLM | None = llm
        self._info = info
        self._version = 0
        self._salt = "initial"
        self._running = 0
        self._swapping = asyncio.Lock()
        self._in_worker = asyncio.Event()
        """Set while a swap has the worker."""
        self._swap_began = 0.0
        self._swaps: set[asyncio.Task[ApplyReport]] = set()

    async def prepare(self) -> None:
        """Prove that the model can be served, and how it can be updated; before the first request.

        Raises:
            EngineError: it cannot.
        """
        with _our_errors():
            fault = await self._ask("spoke_open")
            if fault is not None:
                raise EngineError(f"vLLM cannot serve {self._info.model}: {fault}")
            log.info("vLLM is open; new weights go in by %s", await self._ask("spoke_path"))
            await self._while_alive(self._llm.update_weight_version(_label(0)))
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
        return self._version

    @property
    def open_sequences(self) -> int:
        """Sequences that vLLM has not ended, by its own table; a request on its way there counts as one."""
        if self._opened is None:
            return 0
        table = self._opened.output_processor
        return max(self._running, int(table.get_num_unfinished_requests()))

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample `request.samples` continuations; see `Engine.generate`.

        The first sample is a vLLM request of its own and the others are a second one, because vLLM counts reused
        prompt tokens once a request: the first finds what was in its cache before, the others what the first left
        there. Of these the count of one stands for all.
        """
        llm = self._llm
        check_request(request, self._info)
        prompt = tokens_input(list(request.prompt_token_ids), cache_salt=self._salt)
        # vLLM refuses several greedy samples: they would all be the same.
        distinct = 1 if request.temperature == 0.0 else request.samples
        sizes = [(0, 1), (1, distinct - 1)] if distinct > 1 else [(0, 1)]
        parts = [Part(request, first) for first, _ in sizes]
        with self._busy(), _our_errors():
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
            await self._while_alive(_all(*reads))
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
        """Swap in new weights between two decode steps; see `Engine.load_weights`.

        A caller that is cancelled leaves a swap that goes on to its end: half of one would serve new weights
        under the old version's name.
        """
        swap = asyncio.create_task(self._swap(weights))
        self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        return await asyncio.shield(swap)

    async def check(self) -> None:
        """Prove that the engine answers: by a token where it is idle, by a word from the worker where it is not.

        A token asked of a full engine would wait for its turn and say nothing; the worker answers between two
        decode steps, also while sampling is paused. A swap of weights keeps it from answering for as long as they
        load: within a bound of its own it is a sign of life, also where it begins after the question.

        Raises:
            EngineError: vLLM's process is gone, or a swap takes too long. Silence has no bound here: set one.
        """
        with _our_errors():
            await self._llm.check_health()
            swap = asyncio.ensure_future(self._in_worker.wait())
            sign = asyncio.ensure_future(self._sign())
            try:
                await asyncio.wait({sign, swap}, return_when=asyncio.FIRST_COMPLETED)
                if sign.done():
                    return sign.result()
            finally:
                for task in (sign, swap):
                    task.cancel()
                await asyncio.gather(sign, swap, return_exceptions=True)
        if time.monotonic() - self._swap_began > SWAP_SECONDS:
            raise EngineError(f"vLLM has been loading weights for more than {SWAP_SECONDS:.0f} s")

    async def _sign(self) -> None:
        """A token, or a word from the worker; nothing is asked of a worker that a swap has."""
        if self._in_worker.is_set():
            await asyncio.Future()
        if self._running or self._swaps:
            await self._ask("spoke_path")
            return
        await self.generate(
            GenerateRequest(prompt_token_ids=(0,), samples=1, max_tokens=1, temperature=0.0, seed=0)
        )

    async def died(self) -> EngineError:
        """Wait until vLLM's process is gone; see `Engine.died`."""
        reader = self._llm.output_handler
        assert reader is not None, "vLLM reads its process from the first moment on this loop"
        await asyncio.wait({reader})
        return EngineError("vLLM's process is gone")

    async def openai_app(self, name: str) -> ASGIApp:
        """vLLM's own OpenAI routes on this engine; see `SpeaksOpenAI.openai_app`."""
        # Half a second of imports that an engine alone does not need.
        from server.engines.vllm_openai import GuardedLLM, openai_app

        guarded = GuardedLLM(self._llm, self._info, self._while_alive, self._busy)
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
        await asyncio.gather(*self._swaps, return_exceptions=True)
        # Dropped here and not with this object: vLLM's destructor fails where it runs at the interpreter's end.
        llm, self._opened = self._opened, None
        if llm is None:
            return
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # which ends what still waits for an answer
        context = llm.engine_core.resources.ctx
        await asyncio.to_thread(llm.shutdown)
        await asyncio.sleep(0)  # the closing of its sockets was put on this loop
        context.destroy(linger=0)  # ZeroMQ's threads, which vLLM leaves

    @property
    def _llm(self) -> AsyncLLM:
        if self._opened is None:
            raise EngineError("the engine is closed")
        return self._opened

    async def _swap(self, weights: Weights) -> ApplyReport:
        llm, alive = self._llm, self._while_alive
        files = [str(file) for file in weights.files]
        async with self._swapping:
            with _our_errors(), self._has_worker():
                # Before the pause, so that weights that do not fit disturb no request.
                if (misfit := await self._ask("spoke_check", files)) is not None:
                    raise WeightsError(f"version {weights.version}: {misfit}")
                began = time.perf_counter()
                try:
                    # Keys and values of running requests go too and are computed again: kept ones would be the
                    # old weights'. No token is sampled until the version is named, so that spans are exact.
                    await alive(llm.pause_generation(mode="keep", clear_cache=True))
                    apply_s = await self._ask("spoke_load", files)
                    await alive(llm.update_weight_version(_label(weights.version)))
                    self._version, self._salt = weights.version, weights.digest
                finally:
                    await alive(llm.resume_generation())
            return ApplyReport(pause_s=time.perf_counter() - began, apply_s=apply_s)

    @contextlib.contextmanager
    def _has_worker(self) -> Iterator[None]:
        self._swap_began = time.monotonic()
        self._in_worker.set()
        try:
            yield
        finally:
            self._in_worker.clear()

    async def _ask(self, method: str, *args: object) -> Any:  # noqa: ANN401 - what the method returns
        """The one worker's answer to a method of `vllm_worker.WeightLoader`."""
        return (await self._while_alive(self._llm.collective_rpc(method, args=args)))[0]

    async def _while_alive(self, call: Awaitable[T]) -> T:
        """The answer to a call, or an error once vLLM's process is gone: many calls would wait for ever then."""
        task = asyncio.ensure_future(call)
        reader = self._llm.output_handler  # ends with the process
        assert reader is not None, "vLLM reads its process from the first moment on this loop"
        try:
            await asyncio.wait({task, reader}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineError("vLLM's process is gone")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def open_engine(settings: EngineSettings) -> VllmEngine:
    """Start vLLM. Blocks the event loop while it does (8-40 s): open an engine before serving from the loop.

    Raises:
        ConfigError: no such checkpoint, device, number format or limit.
        EngineError: vLLM does not run here, or cannot serve this checkpoint.
    """
    try:
        llm, info = vllm_start.start(settings)
    except SpokeError:
        raise
    except Exception as error:  # vLLM's start raises every kind of error; the caller needs one line
        line = vllm_start.reason(error)
        raise EngineError(f"vLLM did not start {settings.model}: {line}") from error
    engine = VllmEngine(llm, info)
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


def _label(version: int) -> str:
    """vLLM's name of a weight version."""
    return f"v{version}"


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    """Turn what vLLM raises into errors of ours."""
    try:
        yield
    except (SpokeError, TimeoutError):
        raise
    except VLLMClientError as error:
        raise RequestError("sampling", str(error)) from error
    except Exception as error:  # vLLM's process sends its errors as bare Exceptions
        raise EngineError(f"vLLM failed: {error}") from error
