"""When a server turns stale: trees that grow go on, those in line are handed back, and nothing new is taken."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.admission import Gate
from server.costs import Cost
from server.engines.base import GenerateRequest, GenerateResult
from server.engines.settings import EngineSettings
from server.engines.transformers import open_engine
from server.metrics import Metrics
from server.rewards import RewardPool
from server.service import RolloutService
from server.states import CaughtUp, Heard, Took
from server.status import Status
from server.tokens import Tokens
from shared.errors import BusyError
from shared.fleet import Head, ServerState
from shared.wire import RolloutTreeRequest

TIMEOUT = 30.0
BODY = {
    "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "plan": {"kind": "group", "samples": 1},
    "sampling": {"temperature": 0.0, "max_tokens": 8},
}


class Waits:
    """The real engine, whose requests wait until they may begin."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.begun.set()
        await self.go_on.wait()
        found: GenerateResult = await self._engine.generate(request)
        return found


async def test_a_tree_goes_on_and_what_waits_in_line_is_handed_back(tiny_math: Path) -> None:
    engine: Any = Waits(await open_engine(EngineSettings(model=str(tiny_math), dtype="float32")))
    rewards = RewardPool({}, workers=1)
    status = Status(server_id="test")
    status.note(Took(0, "w0"))
    status.note(CaughtUp())
    gate = Gate(Cost(nodes=1, tokens=1 << 30))
    service = RolloutService(
        engine=engine, tokens=Tokens.load(str(tiny_math)), rewards=rewards, status=status, model="tiny",
        gate=gate, budget=Cost(nodes=100, tokens=10_000), metrics=Metrics(),
    )  # fmt: skip

    def tree() -> asyncio.Task[Any]:
        return asyncio.create_task(service.rollout_tree(RolloutTreeRequest.model_validate(BODY)))

    try:
        async with asyncio.timeout(TIMEOUT):
            growing = tree()
            await engine.begun.wait()
            waiting = tree()
            while gate.waiting == 0:
                await asyncio.sleep(0)
            status.note(
                Heard(
                    Head(version=5, manifest_digest="m", weights_digest="w5", store="file:///s", max_staleness=1)
                )
            )  # fmt: skip
            assert status.state is ServerState.STALE
            engine.go_on.set()
            assert [node.versions for node in (await growing).nodes] == [[], [(0, 8)]]
            with pytest.raises(BusyError, match="stale: it holds version 0, the run is at 5"):
                await waiting
        assert gate.trees == 0
    finally:
        await rewards.close()
        await engine.close()
