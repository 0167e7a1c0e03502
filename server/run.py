"""The life of one server process: listen, load, catch up, serve, leave.

    HTTP up (loading) -> Redis answers -> engine loaded -> head's weights taken -> ready -> … -> draining -> left

A background task that dies takes the process down with a line that says why; it never dies unseen.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
from pathlib import Path

import uvicorn
from safetensors import SafetensorError

from server.app import Holder, create_app
from server.auth import log_auth
from server.engines import EngineName, choose, open_engine
from server.engines.base import Engine
from server.follower import Follower
from server.rewards.pool import RewardPool
from server.service import RolloutService, Status
from server.settings import ServerSettings
from server.tokens import Tokens
from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, SpokeError
from shared.fleet import ServerState
from shared.store import FsspecStore

log = logging.getLogger("spoke.server")

DRAIN_S = 5
"""How long requests in flight may take to end after a stop, seconds."""
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
    holder = Holder(status)
    config = uvicorn.Config(
        create_app(holder, tokens=settings.tokens, limits=settings.limits),
        log_level="warning",
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="off",
    )
    server = _Server(config, status)
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    life = asyncio.create_task(_life(settings, holder, _url(settings, listener)))
    try:
        await asyncio.wait({listening, life}, return_when=asyncio.FIRST_COMPLETED)
        failed = life.done()
        if failed:
            server.should_exit = True
            error = life.exception()
            if isinstance(error, SpokeError) and status.state is ServerState.LOADING:
                raise error
            log.error("a part of this server died: %s", error, exc_info=error)
        return 1 if failed else 0
    finally:
        life.cancel()
        await asyncio.wait({life, listening})


class _Server(uvicorn.Server):
    """uvicorn, which tells the fleet that it is going before it stops to listen."""

    def __init__(self, config: uvicorn.Config, status: Status) -> None:
        super().__init__(config)
        self._status = status

    def handle_exit(self, sig: int, frame: object) -> None:
        """Stop, without uvicorn's habit of raising the signal again, which would end us before we left."""
        self._status.state = ServerState.DRAINING
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


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


async def _life(settings: ServerSettings, holder: Holder, url: str) -> None:
    """Load, catch up, follow; everything opened here is closed here, in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await _coordinator(settings, stack)
        engine = await _engine(settings, stack)
        rewards = RewardPool(
            dict(settings.rewards),
            workers=settings.reward_workers,
            timeout_s=settings.reward_timeout_s,
        )
        await rewards.start()
        stack.push_async_callback(rewards.close)
        service = RolloutService(
            engine=engine,
            tokens=Tokens.load(settings.engine_settings.model),
            rewards=rewards,
            status=holder.status,
            model=settings.engine_settings.model,
        )
        if coordinator is None:
            holder.service = service
            holder.status.state = ServerState.READY
            log.info("%s serves %s at %s", settings.server_id, service.model, url)
            await asyncio.Event().wait()
        else:
            await _follow(settings, holder, service, coordinator, url)


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
    )
    stack.push_async_callback(pool.close)
    await pool.start()
    return pool


async def _follow(
    settings: ServerSettings,
    holder: Holder,
    service: RolloutService,
    coordinator: RedisCoordinator,
    url: str,
) -> None:
    with tempfile.TemporaryDirectory(prefix="spoke-", dir=SCRATCH) as scratch:
        follower = Follower(
            coordinator=coordinator,
            open_store=lambda store_url: FsspecStore(store_url, settings.run),
            store_url=settings.store,
            status=holder.status,
            engine=service.engine,
            url=url,
            scratch=Path(scratch),
        )
        await follower.catch_up()
        holder.service = service
        log.info("%s serves version %d at %s", settings.server_id, service.engine.version, url)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(follower.run())
                group.create_task(follower.heartbeat())
        finally:
            holder.status.state = ServerState.DRAINING
            with contextlib.suppress(SpokeError):
                await coordinator.leave(settings.server_id)
