"""A run of its own for each test: Redis, store, trainer and servers, all of which may be broken."""

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults.parts import Leader, Member, member, until
from support import RedisProcess, running_redis

from shared.coordination import RedisCoordinator
from shared.fleet import ServerRecord


@dataclass
class Run:
    """One run; whatever it starts ends with the test."""

    folder: Path
    model: Path
    redis: RedisProcess
    stack: contextlib.ExitStack
    name: str = field(default_factory=lambda: f"faults-{uuid.uuid4().hex[:8]}")
    published: dict[int, dict[str, str]] = field(default_factory=dict)
    """Version -> SHA-256 of each tensor, as the trainer had them in memory."""

    @property
    def store(self) -> str:
        return f"file://{self.folder / 'store'}"

    def leader(self, *arguments: str) -> Leader:
        known = [
            "--redis-url",
            self.redis.url,
            "--run",
            self.name,
            "--store",
            self.store,
            "--model",
            str(self.model),
        ]
        found = Leader(*known, *arguments, log=self.folder / "leader.log")
        self.stack.callback(found.end)
        return found

    def publish(self, leader: Leader, count: int = 1) -> int:
        """Publish; the newest version's number."""
        said: dict[str, Any] = {}
        for _ in range(count):
            said = leader.publish()
            self.published[said["version"]] = said["tensors"]
        return int(said["version"])

    def tensors_of(self, version: int) -> dict[str, str]:
        """What the trainer had of a version, which a server may hold a moment before the trainer says so here."""
        return until(lambda: self.published.get(version), f"the trainer's word on {version}")

    def member(self, name: str, *arguments: str, faults: str = "") -> Member:
        found = member(
            name, self.model, self.folder, self.redis.url, self.name, *arguments, faults=faults
        )
        return self.stack.enter_context(found)

    def table(self) -> dict[str, ServerRecord]:
        """The fleet table now, by server id."""

        async def read() -> list[ServerRecord]:
            coordinator = RedisCoordinator(self.redis.url, self.name)
            try:
                return await coordinator.servers()
            finally:
                await coordinator.close()

        return {record.server_id: record for record in asyncio.run(read())}

    def record(self, name: str) -> ServerRecord | None:
        """A server's record; None where a stall outlasted it."""
        return self.table().get(name)

    def failure(self, name: str) -> str | None:
        """What a server says that went wrong last."""
        record = self.record(name)
        return record.last_error if record else None

    def check(self, *members: Member) -> None:
        """Whoever says ready holds, tensor by tensor, the very bytes that the trainer had of its version."""
        for one in members:
            live = one.live()
            assert live["tensors"] == self.published[live["version"]], (
                f"{one.name}: version {live['version']}"
            )
            assert live["live_digest"] == live["digest"]


@pytest.fixture
def run(tiny_math: Path, tmp_path: Path) -> Iterator[Run]:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(running_redis())
        yield Run(folder=tmp_path, model=tiny_math, redis=redis, stack=stack)
