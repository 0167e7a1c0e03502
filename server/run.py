"""The life of one server process: listen, load, catch up, serve, leave.

    HTTP up (loading) -> Redis answers -> engine loaded -> head's weights taken -> ready -> … -> told to stop
    -> left the fleet -> drained -> HTTP down -> engine closed

A background task that dies takes the process down with a line that says why; it never dies unseen. So does an
engine that is dead or gives no sign of life: a supervisor starts the server again.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvicorn
from safetensors import SafetensorError

from server.admission import Gate, capacity
from server.app import Holder, alive, create_app
from server.auth import log_auth
from server.costs import Cost
from server.engines import EngineName, choose, open_engine
from server.engines.base import Engine, SpeaksOpenAI
from server.follower import Follower
from server.rewards.pool import RewardPool
from server.service import RolloutService
from server.settings import ServerSettings
from server.status import Status
from server.tokens import Tokens
from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, SpokeError
from shared.fleet import ServerState
from shared.store import FsspecStore

log = logging.getLogger("spoke.server")

CLOSE_S = 20
"""How long the process may take to end once nothing is in flight, seconds; then it is killed."""
HAND_BACK_S = 5
"""How long the answers to what was handed back may take to be read, seconds."""
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where fetched versions lie until they are applied: memory where there is such a folder."""


async def serve(settings: ServerSettings, listener: socket.socket) -> int:
    """Serve on `listener` until told to stop.

    Returns:
        Exit code: 0 when stopped, 1 when a part failed while serving.

    Raises:
        SpokeError: the server cannot start as configured.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log_auth(settings.auth, settings.host, settings.tokens, settings.tokens_file)
    check_model(settings.engine_settings.model)
    status = Status(server_id=settings.server_id)
    holder = Holder(status, liveness_s=settings.liveness_s)
    config = uvicorn.Config(
        create_app(holder, tokens=settings.tokens, limits=settings.limits),
        log_level="warning",
        timeout_graceful_shutdown=HAND_BACK_S,
        lifespan="off",
    )
    stop = asyncio.Event()
    server = _Server(config, stop)
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    life = asyncio.create_task(_life(settings, holder, _url(settings, listener), stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({listening, life, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if holder.service is None:
            life.cancel()  # told to stop before there is anything to drain
        await asyncio.wait({listening, life}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and not life.done():
            await asyncio.wait({life}, timeout=settings.drain_s + CLOSE_S)
        return _outcome(life, status)
    finally:
        await _ended(server, listening, life, stopping)


def _outcome(life: asyncio.Task[None], status: Status) -> int:
    """Exit code of a server whose life is over.

    Raises:
        SpokeError: it never came to serve.
    """
    if not life.done() or life.cancelled():
        return 0
    error: BaseException | None = life.exception()
    if error is None:
        return 0
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, SpokeError) and status.state is ServerState.LOADING:
        raise error
    known = isinstance(error, SpokeError)
    log.error("this server ends: %s", error, exc_info=None if known else error)
    return 1


async def _ended(server: uvicorn.Server, *tasks: asyncio.Task[Any]) -> None:
    """End what still runs; what does not let itself be ended is ended with the process."""
    server.should_exit = True  # after the last answer
    for task in tasks[1:]:
        task.cancel()
    _, left = await asyncio.wait(tasks, timeout=CLOSE_S)
    if left:
        log.error("this server does not end within %d s; it is killed", CLOSE_S)
        os._exit(1)


class _Server(uvicorn.Server):
    """uvicorn, which goes on answering while we drain; a second SIGINT ends it at once."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event) -> None:
        super().__init__(config)
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._told = False

    def handle_exit(self, sig: int, frame: object) -> None:
        """Pass a stop on; uvicorn would raise the signal again, which would end us before we left."""
        if self._told and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self._told = True
        self._loop.call_soon_threadsafe(self._stop.set)


def check_model(model: str) -> None:
    """Refuse a directory that is not there or holds no checkpoint.

    Raises:
        ConfigError: naming it.
    """
    path = Path(model)
    looks_like_path = (
        path.is_absolute() or model.startswith((".", "~")) or path.exists() or model.count("/") > 1
    )
    if looks_like_path and not (path / "config.json").is_file():
        raise ConfigError(
            f"--model {model}: no such checkpoint; a directory with a config.json is needed"
        )


def _url(settings: ServerSettings, listener: socket.socket) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return settings.advertise_url or f"http://{host}:{listener.getsockname()[1]}"


async def _life(settings: ServerSettings, holder: Holder, url: str, stop: asyncio.Event) -> None:
    """Load, catch up, follow, drain; everything opened here is closed here, in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await _coordinator(settings, stack)
        engine = await _engine(settings, stack)
        service = RolloutService(
            engine=engine,
            tokens=Tokens.load(settings.engine_settings.model),
            rewards=await _rewards(settings, stack),
            status=holder.status,
            model=settings.engine_settings.model,
            gate=Gate(_capacity(settings, engine)),
            budget=Cost(nodes=settings.max_tree_nodes, tokens=settings.max_tree_tokens),
            metrics=holder.metrics,
        )
        holder.watch(service)
        follower = None
        if isinstance(engine, SpeaksOpenAI):
            holder.openai = await engine.openai_app(settings.served_model_name or service.model)
        if coordinator is None:
            holder.status.state = ServerState.READY
        else:
            follower = await _follower(settings, holder, service, coordinator, url, stack)
            await follower.catch_up()
        holder.service = service
        settle_heap()
        log.info("%s serves version %d at %s", settings.server_id, engine.version, url)
        try:
            await _serve_until(stop, _watch(engine, settings.liveness_s), follower)
        finally:
            holder.status.state = ServerState.DRAINING
            if (
                coordinator is not None
            ):  # before anything is waited for: nobody may choose this server now
                with contextlib.suppress(SpokeError):
                    await coordinator.leave(settings.server_id)
        await _drain(service, settings.drain_s)


def settle_heap() -> None:
    """Take what is loaded out of the garbage collector's sight: walking it cost a third of the service's time."""
    gc.collect()
    gc.freeze()


def _capacity(settings: ServerSettings, engine: Engine) -> Cost:
    """What may be in flight: the engine's own measure, where the settings say nothing else."""
    own = capacity(engine.info)
    return Cost(
        nodes=settings.max_nodes_in_flight or own.nodes,
        tokens=settings.max_tokens_in_flight or own.tokens,
    )


async def _serve_until(
    stop: asyncio.Event, watch: Coroutine[Any, Any, None], follower: Follower | None
) -> None:
    """Serve until told to stop; raises what a background task dies of."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watch)]
        if follower is not None:
            tasks += [
                group.create_task(follower.run()),
                group.create_task(follower.heartbeat()),
            ]
        await stop.wait()
        for task in tasks:
            task.cancel()


async def _watch(engine: Engine, bound_s: float) -> None:
    """Raise when the engine is dead, or gives no sign of life within a bound."""
    died = asyncio.ensure_future(engine.died())
    try:
        while not died.done():
            await asyncio.wait({died}, timeout=bound_s)
            if not died.done():
                await alive(engine, bound_s)
        raise died.result()
    finally:
        died.cancel()


async def _drain(service: RolloutService, bound_s: float) -> None:
    """Let trees in flight end, within a bound; hand back the others (503), so that another server takes them."""
    status = service.status
    log.info("draining: %d requests in flight, at most %g s", status.in_flight, bound_s)
    if not await status.idle(bound_s):
        log.warning("handed back %d trees that did not end in time", service.hand_back())
        await status.idle(HAND_BACK_S)


async def _coordinator(
    settings: ServerSettings, stack: contextlib.AsyncExitStack
) -> RedisCoordinator | None:
    if settings.redis_url is None:
        return None
    coordinator = RedisCoordinator(settings.redis_url, settings.run)
    stack.push_async_callback(coordinator.close)
    await coordinator.ping()
    return coordinator


async def _engine(settings: ServerSettings, stack: contextlib.AsyncExitStack) -> Engine:
    name = choose(EngineName(settings.engine))
    log.info("loading %s with %s", settings.engine_settings.model, name)
    try:
        engine = await open_engine(name, settings.engine_settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # What a missing, damaged or unknown checkpoint raises deep inside the libraries that read it.
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"--model {settings.engine_settings.model}: it cannot be loaded: {reason}"
        ) from error
    stack.push_async_callback(engine.close)
    return engine


async def _rewards(settings: ServerSettings, stack: contextlib.AsyncExitStack) -> RewardPool:
    pool = RewardPool(
        dict(settings.rewards),
        workers=settings.reward_workers,
        timeout_s=settings.reward_timeout_s,
        memory_bytes=int(settings.reward_memory_gib * 2**30),
        http=settings.reward_http,
    )
    stack.push_async_callback(pool.close)
    await pool.start()
    return pool


async def _follower(
    settings: ServerSettings,
    holder: Holder,
    service: RolloutService,
    coordinator: RedisCoordinator,
    url: str,
    stack: contextlib.AsyncExitStack,
) -> Follower:
    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="spoke-", dir=SCRATCH))
    return Follower(
        coordinator=coordinator,
        open_store=lambda store_url: FsspecStore(store_url, settings.run),
        store_url=settings.store,
        status=holder.status,
        engine=service.engine,
        url=url,
        scratch=Path(scratch),
        metrics=holder.metrics,
    )
