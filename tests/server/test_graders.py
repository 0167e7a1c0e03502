"""A reward that hangs holds up trees of its own alone: who is graded at once is counted by reward."""

import asyncio
import os
from pathlib import Path

import pytest

import server.service
from server.admission import Gate
from server.costs import Cost
from server.engines.settings import EngineSettings
from server.engines.transformers import open_engine
from server.metrics import Metrics
from server.rewards import RewardPool
from server.service import RolloutService
from server.status import Status
from server.tokens import Tokens
from shared.wire import LONGEST_REFERENCE, Reward, RolloutTreeRequest

REWARD = '''
def patient(response, reference, options):
    """Waits for somebody to write into a pipe."""
    if response:
        with open(reference) as pipe:
            return float(pipe.read())
    return 0.0

def at_once(response, reference, options):
    return 2.0
'''


async def test_one_that_hangs_holds_up_no_other(
    tiny_math: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "GRADED_AT_ONCE", 1)
    (tmp_path / "two_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    own = {name: f"two_rewards:{name}" for name in ("patient", "at_once")}
    rewards = RewardPool(own, workers=1, timeout_s=60.0)
    engine = await open_engine(EngineSettings(model=str(tiny_math), dtype="float32"))
    bound = Cost(nodes=1 << 20, tokens=1 << 30)
    service = RolloutService(
        engine=engine,
        tokens=Tokens.load(str(tiny_math)),
        rewards=rewards,
        status=Status(server_id="test"),
        model="tiny",
        gate=Gate(bound),
        budget=bound,
        metrics=Metrics(),
    )

    def tree(name: str) -> asyncio.Task[float | None]:
        story = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
        body = {
            "prompt": story,
            "plan": {"kind": "group", "samples": 1},
            "sampling": {"temperature": 0.0, "max_tokens": 100},
            "reward": {"name": name, "reference": str(pipe)},
        }

        async def reward() -> float | None:
            answer = await service.rollout_tree(RolloutTreeRequest.model_validate(body))
            return answer.nodes[-1].reward

        return asyncio.create_task(reward())

    try:
        hanging = tree("patient")
        # Opens once the reward function reads, so the tree is being graded then.
        writer = await asyncio.wait_for(asyncio.to_thread(open, pipe, "w"), 30)
        with writer:
            assert await asyncio.wait_for(tree("at_once"), 30) == 2.0
            assert not hanging.done()
            writer.write("3")
        assert await asyncio.wait_for(hanging, 30) == 3.0
    finally:
        await rewards.close()
        await engine.close()


def test_a_reference_is_bounded() -> None:
    Reward(name="gsm8k", reference="7" * LONGEST_REFERENCE)
    with pytest.raises(ValueError, match="reference"):
        Reward(name="gsm8k", reference="7" * (LONGEST_REFERENCE + 1))
