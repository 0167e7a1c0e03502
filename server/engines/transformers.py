"""The transformers engine: continuous batching on a Hugging Face model inside this process.

The embedded default for a machine without a GPU. One thread owns the model (`worker`), decodes all rows together
(`batch`), keeps the keys and values of what it has seen (`prefixes`) and takes commands between two steps; this
module is its face on the event loop.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ParamSpec

import torch
from torch import nn

from server.engines.base import (
    ApplyReport,
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Weights,
)
from server.engines.batch import Batch, Times
from server.engines.jobs import Job
from server.engines.model import LanguageModel
from server.engines.parameters import slots
from server.engines.requests import check_request
from server.engines.settings import EngineSettings
from server.engines.staging import Change, live_digests, stage_full, stage_patch
from server.engines.weight_files import naming
from server.engines.worker import Worker
from shared.errors import EngineError, NeedsFullError
from shared.threads import in_daemon_thread

P = ParamSpec("P")
LEFT_S = 2.0
"""Longest wait for the thread of an engine whose start is given up, seconds."""
PROGRESS_S = 1.0
"""How long a sign of life may take before progress counts as one, seconds."""


class TransformersEngine:
    """An `Engine`; see the Protocol for what its methods promise.

    Args:
        worker: the thread that samples.
        model: what it has loaded.
    """

    def __init__(self, worker: Worker, model: LanguageModel) -> None:
        self._worker = worker
        self._model: LanguageModel | None = model
        self._info = model.info
        self._version = 0
        self._digest = ""
        self._loading = asyncio.Lock()

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._info

    @property
    def version(self) -> int:
        """The weight version that the next token will be sampled with."""
        return self._version

    @property
    def digest(self) -> str:
        """Digest of the weights that it holds; empty for the initial checkpoint."""
        return self._digest

    @property
    def open_sequences(self) -> int:
        """Rows that sample, and samples in line."""
        return self._worker.open_sequences

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample `request.samples` continuations. Cancelling the task frees their rows within a step.

        Raises:
            RequestError: the request does not fit the engine.
            EngineError: the engine failed, or its weights are broken.
        """
        check_request(request, self._info)
        job = Job(
            request,
            tell=request.on_news and _on_this_loop(request.on_news),
            tell_completion=request.on_completion and _on_this_loop(request.on_completion),
        )
        self._worker.submit(job)
        return await asyncio.wrap_future(job.future)

    async def load_weights(self, weights: Weights) -> ApplyReport:
        """Swap in new weights between two decode steps; running rows are computed anew and go on.

        The files are read and checked in another thread while the old weights go on sampling.

        Raises:
            NeedsFullError: a patch for other weights than these.
            WeightsError: the files do not fit the model, or writing failed; the old weights stay.
            EngineError: the engine failed.
        """
        async with self._loading:
            with naming(weights.version):
                began = time.perf_counter()
                staged = await asyncio.to_thread(self._stage, weights)
                stage_s = time.perf_counter() - began

                def swap(batch: Batch) -> ApplyReport:
                    report = batch.swap(staged, weights.version)
                    self._version, self._digest = weights.version, weights.digest
                    return replace(report, stage_s=stage_s)

                return await asyncio.wrap_future(self._worker.call(swap))

    async def live_digests(self, dtype: str) -> dict[str, str]:
        """SHA-256 of every parameter, by another thread while the model samples; see `Engine.live_digests`."""
        async with self._loading:
            network = self._network()
            return await asyncio.to_thread(live_digests, slots(network)[0], getattr(torch, dtype))

    def _stage(self, weights: Weights) -> list[Change]:
        """Read and check; in any thread."""
        where = slots(self._network())
        if weights.base_digest is None:
            return stage_full(*where, weights.files)
        if weights.base_digest != self._digest:
            raise NeedsFullError("the patch is for other weights than the engine's")
        return stage_patch(*where, weights.files)

    def _network(self) -> nn.Module:
        if self._model is None:
            raise EngineError("the engine is closed")
        return self._model.network

    async def check(self) -> None:
        """Prove that the thread lives: by one token, beside the batch, or by its progress within a long step.

        Raises:
            EngineError: the model gives no numbers, or the thread has ended.
        """
        before = self._worker.progress
        answer = asyncio.wrap_future(self._worker.call(lambda batch: batch.check()))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=PROGRESS_S)
                if not answer.done() and self._worker.progress > before:
                    return  # it computes a prompt, between whose passes it takes no commands
            answer.result()
        finally:
            answer.cancel()

    async def times(self) -> Times:
        """Where the time of all steps so far went."""
        return await asyncio.wrap_future(self._worker.call(lambda batch: replace(batch.times)))

    async def died(self) -> EngineError:
        """Wait until the thread has ended; see `Engine.died`."""
        return await asyncio.shield(asyncio.wrap_future(self._worker.ended))

    async def close(self) -> None:
        """End the thread and free the model; open requests fail. A second call does nothing."""
        await in_daemon_thread(self._worker.close)
        self._model = None


def _on_this_loop(call: Callable[P, None]) -> Callable[P, None]:
    """A function that any thread may call, to the effect that `call` is called on the running event loop."""
    loop = asyncio.get_running_loop()

    def later(*args: P.args, **kwargs: P.kwargs) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(partial(call, *args, **kwargs))

    return later


async def open_engine(settings: EngineSettings) -> TransformersEngine:
    """Load a checkpoint and start the engine's thread.

    Raises:
        ConfigError: the checkpoint, the device or the limits cannot be had.
        EngineError: the model does not run exactly on our cache.
    """
    worker = Worker(settings)
    try:
        model = await asyncio.wrap_future(worker.ready)
    except BaseException:  # cancelled too: the thread must not live on unseen
        closing = asyncio.ensure_future(in_daemon_thread(worker.close))
        # A load cannot be cut off: it ends with the process.
        await asyncio.wait({closing}, timeout=LEFT_S)
        closing.cancel()
        raise
    return TransformersEngine(worker, model)
