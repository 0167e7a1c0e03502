"""A server is lost mid-tree while new weights come in and a third server joins, as the trainer's fleet sees it.

1. Killed or stopped, it costs no tree: every one comes once, of its plan's shape, within a bound; what had
   finished at the lost server is given along and sampled nowhere again.
2. Trees in flight go on with the new weights; from prompt to leaf versions only grow.
3. A server that joins meanwhile is used as soon as it is ready.
"""

import asyncio
import itertools
import re
import signal
import time
from functools import partial

import httpx
import pytest
from faults.checking import check_tree
from faults.conftest import Run
from faults.parts import Member

from shared.coordination import RedisCoordinator
from shared.wire import Reward, RolloutTreeRequest, RolloutTreeResponse, Sampling, TreePlan
from trainer.client import AsyncClient, NodeLine, attempt
from trainer.fleet import registered

AT_ONCE = 4
NODES = 3 + 3 * 3 + 3 * 3 * 2
"""Of a tree at most."""
BOUND_S = 60.0
"""Of one tree, whatever happens to its server."""


def request_of(number: int, version: int) -> RolloutTreeRequest:
    return RolloutTreeRequest(
        request_id=f"tree-{number}",
        prompt=f"Ana has {number + 2} apples. She buys 5 more. How many apples does Ana have now?\n",
        plan=TreePlan(branch_factors=[3, 3, 2], segment_tokens=8),
        sampling=Sampling(max_tokens=60, seed=number),
        reward=Reward(name="gsm8k", reference=str(number + 7)),
        min_weight_version=version,
    )


def sampled(member: Member) -> int:
    text = httpx.get(f"{member.url}/metrics").text
    return int(float(re.findall(r"^spoke_sampled_tokens_total (\S+)$", text, re.MULTILINE)[0]))


class Load:
    """Trees asked for all the time, a few at once."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.numbers = itertools.count()
        self.version = 0
        self.growing: dict[str, int] = {}
        """Nodes that have come, of each tree that has not."""
        self.trees: dict[str, RolloutTreeResponse] = {}
        self.slowest_s = 0.0
        self.ended = False
        self.news = asyncio.Event()

    async def ask(self) -> None:
        while not self.ended:
            request = request_of(next(self.numbers), self.version)
            begun = time.monotonic()
            number = str(request.request_id)
            self.growing[number] = 0
            tree = await self.client.rollout_tree(request, on_node=partial(self.on_node, number))
            del self.growing[number]
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            check_tree(tree, request)
            assert tree.request_id not in self.trees
            self.trees[tree.request_id] = tree
            self.news.set()

    def on_node(self, number: str, node: NodeLine) -> None:
        self.growing[number] += 1
        self.news.set()

    async def until(self, reached: object) -> None:
        assert callable(reached)
        async with asyncio.timeout(BOUND_S):
            while not reached():
                self.news.clear()
                await self.news.wait()


@pytest.mark.parametrize("with_", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_server_lost_mid_tree_while_weights_change_and_another_joins(
    run: Run, with_: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "SILENT_S", 0.5)
    monkeypatch.setattr(attempt, "LOST_S", 2.0)
    leader = run.leader("--max-staleness", "2")
    lost, steady = run.member("lost"), run.member("steady")
    run.publish(leader)
    for one in (lost, steady):
        one.wait_ready()
    coordinator = RedisCoordinator(run.redis.url, run.name)
    servers = registered(coordinator)
    async with AsyncClient(
        servers, timeout_s=BOUND_S, concurrency=AT_ONCE, affinity_slack=0, keep_nodes=True
    ) as client, asyncio.TaskGroup() as group:  # fmt: skip
        load = Load(client)
        for _ in range(AT_ONCE):
            group.create_task(load.ask())
        # Whichever the server to be lost has: some nodes have come, others are to come.
        await load.until(
            lambda: (
                len(load.trees) >= AT_ONCE
                and all(0 < nodes < NODES // 2 for nodes in load.growing.values())
            )
        )
        lost.send(with_)
        late = run.member("late")
        newest = await asyncio.to_thread(run.publish, leader)
        await asyncio.to_thread(late.wait_ready)
        ready = len(load.trees)
        await load.until(lambda: any(t.server_id == "late" for t in load.trees.values()))
        waited = len(load.trees) - ready
        load.version = newest
        await asyncio.to_thread(steady.wait_version, newest)
        before = len(load.trees)
        await load.until(lambda: len(load.trees) >= before + AT_ONCE)
        load.ended = True
    await coordinator.close()
    trees = list(load.trees.values())
    assert len(trees) == next(load.numbers), "one that was asked for never came"
    assert waited <= 10 * AT_ONCE, "the server that joined was not used"
    assert any(tree.usage.given_tokens for tree in trees), "nothing of the lost server was kept"
    assert any(tree.weight_versions.min < tree.weight_versions.max for tree in trees)
    for one in (steady, late):
        own = sum(t.usage.sampled_tokens for t in trees if t.server_id == one.name)
        assert sampled(one) == own, f"{one.name} sampled what is in no tree"
    assert load.slowest_s < BOUND_S
    if with_ is signal.SIGSTOP:
        lost.send(signal.SIGCONT)
        await asyncio.to_thread(lost.wait_version, newest)
        run.check(lost)
    run.check(steady, late)
