"""A server's last moments: nothing that hangs, errs or swallows a cancellation keeps it from its end.

And its first: an id under which another server lives is refused; that of one that was killed is waited for.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from server.app import Holder
from server.engines.settings import EngineSettings
from server.engines.transformers import TransformersEngine
from server.follower import Follower
from server.life import _serve_until, _watch, life
from server.metrics import Metrics
from server.settings import ServerSettings
from server.states import Phase, Standing
from server.status import Status
from server.taking import Taker
from server.waiting import own_id
from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, CoordinationError, EngineError
from shared.fleet import Head, ServerRecord, ServerState
from shared.threads import in_daemon_thread

TIMEOUT = 10.0


class FakeCoordinator:
    """A Redis that names a head and then goes away."""

    async def head(self) -> Head:
        return Head(version=7, manifest_digest="m", weights_digest="w", store="file:///nowhere")

    def __init__(self) -> None:
        self.asked = False

    async def wait_event(self, after: str, timeout_s: float) -> str:
        if self.asked:
            raise CoordinationError("Redis is away")
        self.asked = True
        return after

    async def report(self, record: Any) -> None:
        raise CoordinationError("Redis is away")


class FakeEngine:
    """Holds version 0."""

    version = 0

    class info:
        model = engine = "fake"


class FakeFetcher:
    """Asks a store that never answers."""

    def __init__(self) -> None:
        self.hanging, self.release = threading.Event(), threading.Event()

    async def chain_to(self, head: Head) -> Any:
        return await in_daemon_thread(self._ask)

    def _ask(self) -> None:
        self.hanging.set()
        self.release.wait()  # the thread ends with the test
        raise OSError("too late")


async def test_a_stop_ends_an_update_whose_store_hangs_while_redis_is_away(tmp_path: Path) -> None:
    coordinator: Any = FakeCoordinator()
    engine: Any = FakeEngine()
    holdings: Any = None
    fetcher, metrics = FakeFetcher(), Metrics()
    status = Status(server_id="s", standing=Standing(phase=Phase.FOLLOWING))
    taker = Taker(
        fetcher=fetcher, holdings=holdings, engine=engine, status=status, folder=tmp_path, metrics=metrics
    )  # fmt: skip
    follower = Follower(
        coordinator=coordinator, taker=taker, status=status, engine=engine,
        url="http://127.0.0.1:1", metrics=metrics,
    )  # fmt: skip
    stop = asyncio.Event()
    serving = asyncio.create_task(_serve_until(stop, asyncio.Event().wait(), follower))  # type: ignore[arg-type]
    try:
        assert await asyncio.to_thread(fetcher.hanging.wait, TIMEOUT)
        stop.set()
        await asyncio.wait_for(serving, TIMEOUT)
    finally:
        fetcher.release.set()
    assert status.standing.failure is None


class FakeWorker:
    """A thread in one long step: it takes no command, and makes progress or none."""

    def __init__(self, pace: int) -> None:
        self._pace, self._progress = pace, 0

    @property
    def progress(self) -> int:
        self._progress += self._pace
        return self._progress

    def call(self, action: Any) -> Any:
        import concurrent.futures

        return concurrent.futures.Future()


ENDING = """
import asyncio, multiprocessing, signal
from server import life

class FakeEngine:
    async def close(self):
        await asyncio.Event().wait()

child = multiprocessing.get_context("fork").Process(target=signal.pause)
child.start()
print(child.pid, flush=True)
life.ENGINE_CLOSE_S = 0.1
asyncio.run(life._closed(FakeEngine()))
"""


def test_a_server_ends_although_its_engine_does_not() -> None:
    """As where the engine's process stands in a driver, and no signal ends it."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDING],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert process.wait(20) == 1
        finally:
            os.kill(child, signal.SIGKILL)


class FakeModel:
    info = None


async def test_progress_within_a_long_step_is_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engines.transformers.PROGRESS_S", 0.01)
    model: Any = FakeModel()
    moving, stuck = (
        TransformersEngine(FakeWorker(pace), model)  # type: ignore[arg-type]
        for pace in (1, 0)
    )
    await asyncio.wait_for(moving.check(), TIMEOUT)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stuck.check(), 0.2)


async def test_the_watch_ends_with_what_the_engine_died_of() -> None:
    class Dead:
        async def died(self) -> EngineError:
            return EngineError("its process is gone")

    engine: Any = Dead()
    with pytest.raises(EngineError, match="its process is gone"):
        await asyncio.wait_for(_watch(engine, 30.0), TIMEOUT)


def living(server_id: str, renewed: float) -> ServerRecord:
    return ServerRecord(
        server_id=server_id, instance="other", url="http://other", state=ServerState.READY, version=0,
        digest="", model="m", engine="e", updated_at=renewed,
    )  # fmt: skip


async def test_a_second_server_under_one_id_ends_while_its_model_is_loaded(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(
        engine="transformers", engine_settings=EngineSettings(model="m"), run=f"run-{uuid.uuid4().hex}",
        redis_url=redis_url, server_id="gpu",
    )  # fmt: skip
    coordinator = RedisCoordinator(redis_url, settings.run)
    loading = asyncio.Event()

    async def load(*_: object) -> None:
        loading.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("server.life._engine", load)
    await coordinator.report(living("gpu", 0.0))
    holder = Holder(Status(server_id="gpu"))
    starting = asyncio.create_task(life(settings, holder, "http://second", asyncio.Event()))
    await asyncio.wait_for(loading.wait(), TIMEOUT)
    beat = 0.0
    async with asyncio.timeout(TIMEOUT):
        while not starting.done():
            beat += 1.0
            await coordinator.report(living("gpu", beat))
            await asyncio.sleep(0.05)
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match="--server-id gpu: the server at http://other")
    ):
        await starting
    assert [record.url for record in await coordinator.servers()] == ["http://other"]
    await coordinator.close()


async def test_the_id_of_a_server_that_was_killed_is_free_once_its_record_is_gone(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = RedisCoordinator(redis_url, f"run-{uuid.uuid4().hex}")
    monkeypatch.setattr("shared.coordination.RECORD_S", 0.3)
    await coordinator.report(living("gpu", 0.0))
    begun = time.monotonic()
    await asyncio.wait_for(own_id(coordinator, "gpu", 1.0), TIMEOUT)
    assert time.monotonic() - begun > 0.2
    assert await coordinator.servers() == []
    await coordinator.close()


async def test_a_server_whose_id_is_taken_meanwhile_ends(redis_url: str, tmp_path: Path) -> None:
    coordinator = RedisCoordinator(redis_url, f"run-{uuid.uuid4().hex}")
    await coordinator.report(living("s", 0.0))
    fakes: Any = FakeFetcher()
    engine: Any = FakeEngine()
    status = Status(server_id="s", standing=Standing(phase=Phase.FOLLOWING))
    metrics = Metrics()
    taker = Taker(
        fetcher=fakes, holdings=fakes, engine=engine, status=status, folder=tmp_path, metrics=metrics
    )  # fmt: skip
    follower = Follower(
        coordinator=coordinator, taker=taker, status=status, engine=engine,
        url="http://127.0.0.1:1", metrics=metrics,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--server-id s: the server at http://other"):
        await asyncio.wait_for(follower.heartbeat(), TIMEOUT)
    await coordinator.close()
