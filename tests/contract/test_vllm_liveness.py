"""A sign of life from vLLM while weights load: its worker cannot answer then, and yet it lives."""

import asyncio
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.engines import vllm_process, vllm_transfer, vllm_weights
from server.engines.base import EngineInfo, Weights
from server.engines.vllm import VllmEngine
from shared.errors import EngineError, WeightsError
from shared.transfer import TransferBackend, TransferGroup

pytestmark = [pytest.mark.vllm]

WEIGHTS = Weights(version=1, digest="d", files=(Path("a"),))
INFO = EngineInfo(
    engine="vllm", model="none", dtype="float32", device="cpu", vocab_size=9, max_model_len=9,
    eos_token_ids=(), max_batch=1, kv_tokens=1, block_tokens=1,
)  # fmt: skip
GROUP = TransferGroup(
    backend=TransferBackend.GLOO, address="127.0.0.1", port=1, rank=1, size=2, timeout_s=30.0
)


class FakeLLM:
    """A fake AsyncLLM, whose worker loads for as long as a test wants, and answers nothing meanwhile."""

    def __init__(self) -> None:
        self.output_handler = asyncio.ensure_future(asyncio.Event().wait())
        self.loading = asyncio.Event()
        self.loaded = asyncio.Event()
        self.silent = False
        self.speaks = asyncio.Event()
        """Ends its silence."""
        self.resumed = False
        self.reads = True
        self.fault: str | None = None
        self.size = 0
        """Bytes that the worker has to write."""
        self.renderer = self.engine_core = self

    async def check_health(self) -> None:
        pass

    async def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[Any]:
        if method == "spoke_write":
            self.loading.set()
            await self.loaded.wait()
            return [[0.0, self.fault]]
        if self.silent:
            await self.speaks.wait()
        answers = {"spoke_stage": True, "spoke_progress": [0, self.reads, None, self.size]}
        return [answers.get(method, 0.0)]

    async def clear_mm_cache_async(self) -> None:
        pass

    async def pause_scheduler_async(self, **options: object) -> None:
        pass

    async def resume_generation(self) -> None:
        self.resumed = True

    async def update_weight_version(self, label: str) -> None:
        pass


@pytest.fixture
async def llm():
    llm = FakeLLM()
    yield llm
    llm.output_handler.cancel()


async def within(awaited: Any) -> Any:
    return await asyncio.wait_for(awaited, 5)


async def test_a_swap_is_a_sign_of_life_within_a_bound_of_its_own(llm) -> None:
    engine = VllmEngine(llm, INFO)
    swap = asyncio.create_task(engine.load_weights(WEIGHTS))
    await within(llm.loading.wait())
    llm.silent = True  # the worker loads
    await within(engine.check())
    llm.loaded.set()
    await within(swap)


async def test_a_write_beyond_its_bound_ends_the_engine(llm, monkeypatch) -> None:
    monkeypatch.setattr(vllm_weights, "SWAP_SECONDS", 0.05)
    engine = VllmEngine(llm, INFO)
    with pytest.raises(EngineError, match="did not write version 1 in 0 s"):
        await within(engine.load_weights(WEIGHTS))
    assert "did not write" in str(await within(engine.died()))
    llm.silent = True
    engine._running = 1
    for call in (engine.check(), engine.load_weights(WEIGHTS), engine.live_digests("float32")):
        with pytest.raises(EngineError, match="did not write"):
            await within(call)
    assert not llm.resumed  # a mixture of two versions must never sample


async def test_the_bound_grows_with_what_there_is_to_write(llm, monkeypatch) -> None:
    monkeypatch.setattr(vllm_weights, "SWAP_SECONDS", 0.0)
    llm.size = 10**12
    engine = VllmEngine(llm, INFO)
    swap = asyncio.create_task(engine.load_weights(WEIGHTS))
    await within(llm.loading.wait())
    llm.loaded.set()
    await within(swap)
    assert llm.resumed


async def test_a_write_that_was_undone_leaves_the_engine_as_it_was(llm) -> None:
    engine = VllmEngine(llm, INFO)
    llm.loaded.set()
    llm.fault = "writing failed and was undone"
    with pytest.raises(WeightsError, match="version 1: writing failed and was undone"):
        await within(engine.load_weights(WEIGHTS))
    assert (engine.version, engine.digest, llm.resumed) == (0, "", True)
    engine._running = 1
    await within(engine.check())


async def test_a_worker_that_does_not_leave_its_group_is_given_up(llm, monkeypatch) -> None:
    monkeypatch.setattr(vllm_transfer, "GRACE_S", 0.05)
    monkeypatch.setattr(vllm_weights, "SWAP_SECONDS", 0.0)
    engine = VllmEngine(llm, INFO, "gloo")
    llm.silent = True
    with pytest.raises(EngineError, match="leaving a transfer group took more than"):
        await within(engine.transfer.leave())
    assert "leaving" in str(await within(engine.died()))


@pytest.mark.parametrize(("swap_s", "group_s"), [(30.0, None), (0.0, 30.0)])
async def test_a_worker_leaves_its_group_after_the_step_that_it_is_in(
    llm, monkeypatch, swap_s, group_s
) -> None:
    monkeypatch.setattr(vllm_transfer, "GRACE_S", 0.05)
    monkeypatch.setattr(vllm_weights, "SWAP_SECONDS", swap_s)
    engine = VllmEngine(llm, INFO, "gloo")
    if group_s is not None:
        await within(engine.transfer.join(GROUP.model_copy(update={"timeout_s": group_s})))
    llm.silent = True
    leaving = asyncio.create_task(engine.transfer.leave())
    done, _ = await asyncio.wait({leaving}, timeout=0.3)
    assert not done
    llm.speaks.set()
    await within(leaving)


async def test_closing_waits_for_no_process_that_does_not_end(llm) -> None:
    """Once its caller has given it up the interpreter may end, which waits for threads that are no daemons."""
    release = threading.Event()
    llm.shutdown = release.wait
    llm.resources = SimpleNamespace(ctx=None, engine_manager=None)
    engine = VllmEngine(llm, INFO)
    before = set(threading.enumerate())
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.close(), 0.1)
        begun = set(threading.enumerate()) - before
        assert [thread.daemon for thread in begun] == [True]
    finally:
        release.set()


async def test_reading_that_stands_still_is_left_alone(llm, monkeypatch) -> None:
    monkeypatch.setattr(vllm_weights, "STALL_SECONDS", 0.0)
    llm.reads = False
    engine = VllmEngine(llm, INFO)
    with pytest.raises(WeightsError, match="no tensor was done in 0 s"):
        await within(engine.load_weights(WEIGHTS))
    engine._running = 1
    await within(engine.check())


async def test_a_swap_that_begins_after_the_question_answers_it(llm) -> None:
    engine = VllmEngine(llm, INFO)
    llm.silent = True
    engine._running = 1
    check = asyncio.create_task(engine.check())
    await asyncio.sleep(0)
    assert not check.done()
    llm.silent = False
    swap = asyncio.create_task(engine.load_weights(WEIGHTS))
    await within(check)
    llm.loaded.set()
    await within(swap)


async def test_silence_has_no_bound_of_the_engines_own(llm) -> None:
    engine = VllmEngine(llm, INFO)
    llm.silent = True
    engine._running = 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await engine.check()


def test_a_process_whose_exit_code_another_thread_took_is_gone(monkeypatch) -> None:
    """vLLM watches its processes in a thread of its own, which may be the one that learns of their end."""
    left: list[int] = []
    monkeypatch.setattr(vllm_process, "leave_children", lambda: left.append(1))
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    os.waitpid(process.pid, 0)
    assert process.is_alive(), "multiprocessing knows now: this proves nothing any more"
    vllm_process.wait_killed(process)
    assert not left
    process._popen.returncode = 0  # as the other thread notes it in the end
    assert process not in multiprocessing.active_children()


def test_a_process_that_does_not_end_is_left(monkeypatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(vllm_process, "leave_children", lambda: left.append(1))
    monkeypatch.setattr(vllm_process, "KILLED_SECONDS", 0.1)
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    try:
        vllm_process.wait_killed(process)
        assert left
    finally:
        process.kill()
        process.join()
