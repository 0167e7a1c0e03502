"""A running server under measurement: its capacity, whether it holds anything, what it does when idle."""

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.benchmarks.load_parts import mix
from tests.benchmarks.load_parts.watch import Sample, Watch
from tests.support import ServerProcess

SETTLE_S = 10.0
"""Longest time from the last client's leaving to a server that holds nothing."""


@dataclass
class Bench:
    """A server that runs, and what is known of it."""

    args: argparse.Namespace
    server: ServerProcess
    info: dict[str, Any]
    client: httpx.AsyncClient
    watch: Watch

    @property
    def url(self) -> str:
        """Of the server."""
        return self.server.url

    def capacity(self, bodies: list[mix.Body]) -> float:
        """Trees like these that the server lets in at once."""
        limits, cost = self.info["limits"], mix.mean_cost(bodies)
        by_nodes = limits["nodes_in_flight"] / cost.nodes
        return max(1.0, min(by_nodes, limits["tokens_in_flight"] / cost.tokens))

    async def settled(self) -> tuple[float, Sample]:
        """(seconds until nothing was in flight, the last look): it may come too late."""
        began = time.perf_counter()
        while True:
            sample = await self.watch.look(0.0, self.client)
            took = time.perf_counter() - began
            if not any(sample.gauges().values()) or took > SETTLE_S:
                return took, sample
            await asyncio.sleep(0.05)

    async def idle_cpu(self, seconds: float = 2.0) -> float:
        """CPU of all the server's processes, in cores."""
        before = self.watch.cpu_s()
        await asyncio.sleep(seconds)
        after = self.watch.cpu_s()
        return sum(after[pid] - before.get(pid, 0.0) for pid in after) / seconds

    async def alone(self) -> float:
        """Seconds of one and the same request without company: the fastest of seven."""
        body = mix.plain_body(mix.questions(11, 1)[0], mix.PLANS[5])
        body["sampling"] |= {"seed": 5}
        times = []
        for _ in range(7):
            began = time.perf_counter()
            answer = await self.client.post(f"{self.url}/rollout_tree", json=body)
            answer.raise_for_status()
            times.append(time.perf_counter() - began)
        return min(times)
