"""A server's last moments: nothing that hangs, errs or swallows a cancellation keeps it from its end."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from server.engines.transformers import TransformersEngine
from server.follower import Follower
from server.life import _serve_until, _watch
from server.metrics import Metrics
from server.states import Phase, Standing
from server.status import Status
from server.taking import Taker
from server.threads import in_daemon_thread
from shared.errors import CoordinationError, EngineError
from shared.fleet import Head

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
        coordinator=coordinator, taker=taker, files=tuple, status=status, engine=engine,
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
