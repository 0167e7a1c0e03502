"""Tokens of a tree that is begun anew are counted, those of responses that had not ended too."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.admission import Gate
from server.costs import Cost
from server.engines.base import GenerateRequest, GenerateResult
from server.engines.settings import EngineSettings
from server.engines.transformers import open_engine
from server.metrics import Metrics
from server.rewards import RewardPool
from server.service import RolloutService
from server.states import CaughtUp, Took
from server.status import Status
from server.tokens import Tokens
from shared.wire import RolloutTreeRequest

TIMEOUT = 60.0
BODY = {
    "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "plan": {"kind": "group", "samples": 4},
    "sampling": {"max_tokens": 60, "seed": 3},
    "in_flight": "restart",
}


class Tells:
    """The real engine; `told` holds what it has told of each of a request's samples."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.told: list[dict[int, int]] = []
        self.some = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        told: dict[int, int] = {}
        self.told.append(told)
        tell_news, tell_completion = request.on_news, request.on_completion
        assert tell_news is not None
        assert tell_completion is not None

        def news(pieces: Any) -> None:
            for piece in pieces:
                told[piece.sample] = told.get(piece.sample, 0) + len(piece.token_ids)
            self.some.set()
            tell_news(pieces)

        def completion(sample: int, done: Any) -> None:
            told[sample] = len(done.token_ids)
            tell_completion(sample, done)

        result: GenerateResult = await self._engine.generate(
            replace(request, on_news=news, on_completion=completion)
        )
        return result


async def test_what_was_sampled_before_a_swap_is_counted(tiny_math: Path) -> None:
    engine: Any = Tells(await open_engine(EngineSettings(model=str(tiny_math), dtype="float32")))
    rewards, metrics = RewardPool({}, workers=1), Metrics()
    status = Status(server_id="test")
    status.note(Took(0, "w0"))
    status.note(CaughtUp())
    service = RolloutService(
        engine=engine, tokens=Tokens.load(str(tiny_math)), rewards=rewards, status=status, model="tiny",
        gate=Gate(Cost(nodes=100, tokens=1 << 30)), budget=Cost(nodes=100, tokens=10_000), metrics=metrics,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT):
            growing = asyncio.create_task(
                service.rollout_tree(RolloutTreeRequest.model_validate(BODY))
            )
            await engine.some.wait()
            for tell in status.on_swap:
                tell()
            usage = (await growing).usage
            again = (await service.rollout_tree(RolloutTreeRequest.model_validate(BODY))).usage
    finally:
        await engine.close()
        await rewards.close()
    assert usage.discarded_tokens == sum(engine.told[0].values()) > 0
    assert usage.sampled_tokens == sum(engine.told[1].values())
    assert usage.spent_tokens == usage.sampled_tokens + usage.discarded_tokens
    assert again.discarded_tokens == 0
    assert f"spoke_discarded_tokens_total {usage.discarded_tokens}.0" in metrics.text().decode()
