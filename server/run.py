"""The life of one server process: listen, load, catch up, serve, leave.

    HTTP up (loading) -> Redis answers -> engine loaded -> head's weights taken -> ready -> … -> told to stop
    -> left the fleet -> drained -> HTTP down -> engine closed

A background task that dies takes the process down with a line that says why; it never dies unseen. So does an
engine that is dead or gives no sign of life: a supervisor starts the server again.
"""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn

from server.app import Holder, create_app
from server.auth import log_auth
from server.life import HAND_BACK_S, life
from server.settings import ServerSettings
from server.states import Standing
from server.status import Status
from shared.errors import ConfigError, SpokeError
from shared.fleet import ServerState

log = logging.getLogger("spoke.server")

CLOSE_S = 20
"""How long the process may take to end once nothing is in flight, seconds; then it is killed."""


async def serve(settings: ServerSettings, listener: socket.socket) -> int:
    """Serve on `listener` until told to stop.

    Returns:
        Exit code: 0 when stopped, 1 when a part failed while serving.

    Raises:
        SpokeError: the server cannot start as configured.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for noisy in ("httpx", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    log_auth(
        settings.auth,
        settings.host,
        settings.tokens,
        settings.tokens_file,
        in_environment=settings.tokens_in_environment,
    )
    check_model(settings.engine_settings.model)
    if settings.redis_url is None and (settings.run != "default" or settings.store):
        log.warning(
            "no run is followed: Redis is named neither in --redis-url nor in SPOKE_REDIS_URL"
        )
    status = Status(server_id=settings.server_id, standing=Standing(max_lag=settings.max_lag))
    holder = Holder(status, liveness_s=settings.liveness_s)
    config = uvicorn.Config(
        create_app(
            holder,
            tokens=settings.tokens,
            limits=settings.limits,
            transfers=settings.engine_settings.weight_transfer is not None,
        ),
        log_level="warning",
        timeout_graceful_shutdown=HAND_BACK_S,
        lifespan="off",
    )
    stop = asyncio.Event()
    server = _Server(config, stop)
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    living = asyncio.create_task(life(settings, holder, _url(settings, listener), stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({listening, living, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and holder.service is not None:
            # It drains, within this bound; uvicorn ends before only where a second SIGINT asks for it.
            await asyncio.wait(
                {listening, living},
                timeout=settings.drain_s + CLOSE_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        elif stop.is_set():
            log.info("stopped while it was loading")
        return _outcome(listening, living, status, stopped=stop.is_set())
    finally:
        await _ended(server, listening, living, stopping)


def _outcome(
    listening: asyncio.Task[None], living: asyncio.Task[None], status: Status, *, stopped: bool
) -> int:
    """Exit code of a server that ends.

    Raises:
        SpokeError: it never came to serve.
    """
    dead = next(
        (task for task in (living, listening) if task.done() and not task.cancelled()), None
    )
    error = dead.exception() if dead is not None else None
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, SpokeError) and status.state is ServerState.LOADING:
        raise error
    if error is not None:
        known = isinstance(error, SpokeError)
        log.error("this server ends: %s", error, exc_info=None if known else error)
    elif not stopped:
        log.error("this server ends: its HTTP side has ended")
    return 0 if error is None and stopped else 1


async def _ended(
    server: uvicorn.Server, listening: asyncio.Task[None], *tasks: asyncio.Task[Any]
) -> None:
    """End what still runs; what does not let itself be ended is ended with the process."""
    server.should_exit = True  # after the last answer
    for task in tasks:
        task.cancel()
    _, left = await asyncio.wait({listening, *tasks}, timeout=CLOSE_S)
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
    if settings.advertise_url is not None:
        return settings.advertise_url
    everywhere = settings.host in ("0.0.0.0", "::")
    url = f"http://{'127.0.0.1' if everywhere else settings.host}:{listener.getsockname()[1]}"
    if everywhere and settings.redis_url is not None:
        log.warning(
            "the fleet is told %s, which other machines do not reach; say how they do in --advertise-url",
            url,
        )
    return url
