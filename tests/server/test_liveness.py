"""One question to the engine at a time, whoever asks for a sign of life, and its answer for a moment after."""

import asyncio
from typing import Any

import pytest

from server.liveness import Pulse
from shared.errors import EngineError


class FakeEngine:
    """A fake engine, which only counts how often it is asked for a sign of life."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()
        self.fault: EngineError | None = None

    async def check(self) -> None:
        self.asked += 1
        await self.go.wait()
        if self.fault is not None:
            raise self.fault


async def test_all_who_ask_share_one_question() -> None:
    engine: Any = FakeEngine()
    pulse = Pulse(10.0, fresh_s=60.0)
    leaving = asyncio.create_task(pulse.feel(engine))
    staying = [asyncio.create_task(pulse.feel(engine)) for _ in range(50)]
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    engine.go.set()
    await asyncio.wait_for(asyncio.gather(*staying), 5)
    await pulse.feel(engine)
    assert engine.asked == 1


async def test_an_answer_grows_old() -> None:
    engine: Any = FakeEngine()
    engine.go.set()
    pulse = Pulse(10.0, fresh_s=0.0)
    await pulse.feel(engine)
    engine.fault = EngineError("dead")
    for _ in range(2):
        with pytest.raises(EngineError, match="dead"):
            await pulse.feel(engine)
    assert engine.asked == 3


async def test_silence_has_a_bound() -> None:
    with pytest.raises(EngineError, match=r"no sign of life in 0\.05 s"):
        await Pulse(0.05).feel(FakeEngine())  # type: ignore[arg-type]
