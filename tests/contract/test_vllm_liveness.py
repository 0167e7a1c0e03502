"""A sign of life from vLLM while weights load: its worker cannot answer then, and yet it lives."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.engines import vllm
from server.engines.base import EngineInfo, Weights
from server.engines.vllm import VllmEngine
from shared.errors import EngineError

pytestmark = [pytest.mark.vllm]

WEIGHTS = Weights(version=1, digest="d", files=(Path("a"),))
INFO = EngineInfo(
    engine="vllm", model="none", dtype="float32", device="cpu", vocab_size=9, max_model_len=9,
    eos_token_ids=(), max_batch=1, kv_tokens=1, block_tokens=1,
)  # fmt: skip


class FakeLLM:
    """A fake AsyncLLM, whose worker loads for as long as a test wants, and answers nothing meanwhile."""

    def __init__(self) -> None:
        self.output_handler = asyncio.ensure_future(asyncio.Event().wait())
        self.loading = asyncio.Event()
        self.loaded = asyncio.Event()
        self.silent = False

    async def check_health(self) -> None:
        pass

    async def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[Any]:
        if method == "spoke_load":
            self.loading.set()
            await self.loaded.wait()
            return [0.0]
        if self.silent:
            await asyncio.Event().wait()
        return [None]

    async def pause_generation(self, **options: object) -> None:
        pass

    async def resume_generation(self) -> None:
        pass

    async def update_weight_version(self, label: str) -> None:
        pass


@pytest.fixture
async def llm():
    llm = FakeLLM()
    yield llm
    llm.output_handler.cancel()


async def within(awaited: Any) -> None:
    await asyncio.wait_for(awaited, 5)


async def test_a_swap_is_a_sign_of_life_within_a_bound_of_its_own(llm, monkeypatch) -> None:
    engine = VllmEngine(llm, INFO)
    swap = asyncio.create_task(engine.load_weights(WEIGHTS))
    await within(llm.loading.wait())
    llm.silent = True  # the worker loads
    await within(engine.check())
    monkeypatch.setattr(vllm, "SWAP_SECONDS", 0.0)
    with pytest.raises(EngineError, match="loading weights for more than 0 s"):
        await within(engine.check())
    llm.loaded.set()
    await within(swap)


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
