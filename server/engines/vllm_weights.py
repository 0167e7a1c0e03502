"""Which weights a vLLM engine holds, and how it takes others: read while it samples, written in a short pause."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from server.engines.base import ApplyReport, Weights
from server.engines.vllm_process import VllmProcess, our_errors
from server.engines.weight_files import naming
from shared.errors import EngineError, NeedsFullError, SpokeError, WeightsError

T = TypeVar("T")

SWAP_SECONDS = 30.0
"""Shortest bound of a pause: of a decode step that must end first, and of writing little."""
FLOOR_RATE = 100e6
"""Bytes a second that a worker writes at least, or is taken for one that hangs."""
STALL_SECONDS = 60.0
"""Longest time that reading or hashing one tensor may take."""
_POLL_S = (0.002, 0.05)
"""Shortest and longest pause between two questions after a job's progress."""


class VllmWeights:
    """The weights of one vLLM engine. Updates and digests take turns.

    Args:
        process: vLLM.
    """

    def __init__(self, process: VllmProcess) -> None:
        self.version = 0
        self.digest = ""
        self.in_pause = asyncio.Event()
        """Set while an update has the worker, which then answers nothing; for a bounded time."""
        self._process = process
        self._path = "slots"
        self._turn = asyncio.Lock()
        self._updates: set[asyncio.Task[ApplyReport]] = set()

    @property
    def salt(self) -> str:
        """Of the prefix cache: no key or value that other weights computed is ever found."""
        return self.digest or "initial"

    @property
    def updating(self) -> bool:
        """Is an update under way, or waiting for its turn?"""
        return bool(self._updates)

    @property
    def named(self) -> bool:
        """Can the parameters in memory be told apart by checkpoint names?"""
        return self._path == "slots"

    async def prepare(self) -> str:
        """Learn how new weights get in (`WeightLoader.spoke_path`) and name the first version."""
        self._path = await self._process.ask("spoke_path")
        await self._process.while_alive(self._process.llm.update_weight_version(_label(0)))
        return self._path

    async def load(self, weights: Weights) -> ApplyReport:
        """Swap in new weights between two decode steps; see `Engine.load_weights`.

        A caller that is cancelled leaves a swap that goes on to its end: half of one would serve new weights
        under the old version's name.
        """
        return await self._to_its_end(self._update(weights))

    async def _to_its_end(self, update: Coroutine[Any, Any, ApplyReport]) -> ApplyReport:
        task = asyncio.create_task(update)
        self._updates.add(task)
        task.add_done_callback(self._over)
        return await asyncio.shield(task)

    def _over(self, task: asyncio.Task[ApplyReport]) -> None:
        self._updates.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: whoever waited for it may be gone

    async def live_digests(self, dtype: str) -> dict[str, str]:
        """SHA-256 of every parameter in memory; see `Engine.live_digests`. Sampling goes on meanwhile."""
        if not self.named:
            raise EngineError("this model's parameters cannot be told apart by checkpoint names")
        async with self._turn:
            with our_errors():
                return await self.digests_in_turn(dtype)

    async def digests_in_turn(self, dtype: str) -> dict[str, str]:
        """As `live_digests`, for whoever has the turn."""
        try:
            digests: dict[str, str] = await self._job("spoke_digests", dtype)
        except WeightsError as error:
            raise EngineError(f"digests of the live weights: {error}") from error
        return digests

    async def alone(self, call: Awaitable[T]) -> T:
        """A call that keeps the worker for a bounded time, in its turn."""
        async with self._turn:
            with self._has_worker():
                return await call

    async def exchange(
        self, version: int, digest: str, write: Callable[[], Awaitable[None]], bound_s: float
    ) -> ApplyReport:
        """Pause, write by whatever way, name the version, go on. A caller that is cancelled leaves it to its end.

        Raises:
            EngineError: writing failed: vLLM is given up.
        """

        async def timed() -> tuple[float, str | None]:
            began = time.monotonic()
            await write()
            return time.monotonic() - began, None

        async def update() -> ApplyReport:
            async with self._turn:
                pause_s, apply_s, _ = await self._paused(version, digest, timed, bound_s)
            return ApplyReport(stage_s=0.0, pause_s=pause_s, apply_s=apply_s)

        return await self._to_its_end(update())

    async def ended(self, bound_s: float) -> None:
        """Wait until no update is under way, at most so many seconds."""
        if self._updates:
            await asyncio.wait(self._updates, timeout=bound_s)

    async def _update(self, weights: Weights) -> ApplyReport:
        async with self._turn:
            self._process.llm  # noqa: B018 - raises where the engine is closed
            began = time.perf_counter()
            with our_errors(), naming(weights.version):
                size = await self._stage(weights)
                stage_s = time.perf_counter() - began
                pause_s, apply_s, fault = await self._paused(
                    weights.version,
                    weights.digest,
                    lambda: self._process.ask("spoke_write"),
                    max(SWAP_SECONDS, size / FLOOR_RATE),
                )
                if fault is not None:
                    raise WeightsError(fault)
            return ApplyReport(stage_s=stage_s, pause_s=pause_s, apply_s=apply_s)

    async def _stage(self, weights: Weights) -> int:
        """Read and check the files in the worker, while it samples; returns the bytes that writing will move."""
        is_patch = weights.base_digest is not None
        if self._path == "none":
            raise WeightsError("vLLM stores this model in a form that cannot take new weights")
        if is_patch and not self.named:
            raise NeedsFullError("vLLM loads this model by its own loader, from full sets only")
        if is_patch and weights.base_digest != self.digest:
            raise NeedsFullError("the patch is for other weights than the engine's")
        files = [str(file) for file in weights.files]
        return int(await self._job("spoke_stage", files, is_patch))

    async def _job(self, method: str, *args: object) -> Any:  # noqa: ANN401 - the job's result
        """The result of a job of the worker, which runs beside its decode steps.

        Raises:
            WeightsError: it failed, or stands still.
        """
        if not await self._process.ask(method, *args):
            raise WeightsError("vLLM's worker is still at an update that was given up")
        before, moved, wait = -1, time.monotonic(), _POLL_S[0]
        while True:
            steps, done, fault, result = await self._process.ask("spoke_progress")
            if fault is not None:
                raise WeightsError(fault)
            if done:
                return result
            if steps != before:
                before, moved = steps, time.monotonic()
            elif time.monotonic() - moved > STALL_SECONDS:
                raise WeightsError(f"no tensor was done in {STALL_SECONDS:.0f} s")
            await asyncio.sleep(wait)
            wait = min(2 * wait, _POLL_S[1])

    async def _paused(
        self,
        version: int,
        digest: str,
        write: Callable[[], Awaitable[tuple[float, str | None]]],
        bound_s: float,
    ) -> tuple[float, float, str | None]:
        """Pause, write, name, go on; returns the pause and the writing in seconds, and why nothing was written.

        Whatever else fails leaves the model in a state that nobody knows: vLLM is given up then, and no longer
        samples.
        """
        with self._has_worker():
            try:
                async with asyncio.timeout(bound_s):
                    began = await self._pause()
                    apply_s, fault = await write()
                    if fault is None:
                        self.version, self.digest = version, digest
                    # No token is sampled until the version is named, so that spans are exact.
                    await self._resume()
                    return time.monotonic() - began, apply_s, fault
            except TimeoutError:
                reason = f"it did not write version {version} in {bound_s:.0f} s"
            except SpokeError as error:
                reason = str(error)
            except Exception as error:  # vLLM's process sends its errors as bare Exceptions
                reason = f"writing version {version} failed: {error}"
            raise self._process.give_up(f"vLLM is given up: {reason}")

    async def _pause(self) -> float:
        """Stop sampling between two steps; returns when, by the monotonic clock.

        Keys and values of running requests go too and are computed again: kept ones would be the old weights'.
        These are the steps of `AsyncLLM.pause_generation`, which sleeps for 20 ms besides.
        """
        llm, alive = self._process.llm, self._process.while_alive
        await alive(llm.renderer.clear_mm_cache_async())
        began, _ = await asyncio.gather(
            self._process.ask("spoke_clock"),  # sent first, and so answered right before
            alive(llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)),
        )
        return float(began)

    async def _resume(self) -> None:
        """Name the version, then go on; sent together, and vLLM takes them in this order."""
        llm, alive = self._process.llm, self._process.while_alive
        await asyncio.gather(
            alive(llm.update_weight_version(_label(self.version))), alive(llm.resume_generation())
        )

    @contextlib.contextmanager
    def _has_worker(self) -> Iterator[None]:
        self.in_pause.set()
        try:
            yield
        finally:
            self.in_pause.clear()


def _label(version: int) -> str:
    """vLLM's name of a weight version."""
    return f"v{version}"
