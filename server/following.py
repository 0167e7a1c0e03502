"""Puts together what follows a run: where fetched versions lie, who fetches them, who takes them."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from server.advertising import Advertiser
from server.app import Holder
from server.fetching import Fetcher
from server.follower import Follower
from server.holdings import Holdings
from server.service import RolloutService
from server.settings import ServerSettings
from server.taking import Taker
from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, WeightsError
from shared.http_store import open_peer
from shared.open_store import open_store
from shared.scratch import Scratch
from shared.sources import Sources
from shared.threads import in_daemon_thread

OPEN_S = 15.0
"""Longest wait for a store that connects when it is opened."""


async def open_follower(
    settings: ServerSettings,
    holder: Holder,
    service: RolloutService,
    coordinator: RedisCoordinator,
    url: str,
    stack: contextlib.AsyncExitStack,
) -> Follower:
    """A follower of the settings' run; what it opens is closed with the stack.

    Args:
        settings: of the server.
        holder: gets the versions on this disk, for whoever asks for their files.
        service: has the engine.
        coordinator: Redis.
        url: how others reach this server.
        stack: of the server's life.

    Raises:
        ConfigError: the folder of versions cannot be used.
    """

    async def needs(lowest: int | None) -> None:
        await follower.needs(lowest)

    holdings, work = await in_daemon_thread(_folders, settings, stack)
    holder.holdings = holdings
    fetcher = Fetcher(
        holdings=holdings,
        coordinator=coordinator,
        open_store=lambda store_url: open_store(
            store_url, settings.run, token=settings.store_token
        ),
        open_peer=lambda peer_url: open_peer(peer_url, settings.run, token=settings.store_token),
        store_url=settings.store,
        url=url,
        needs=needs,
        peers=settings.peers,
        count=lambda source, size: holder.metrics.fetched.labels(source).inc(size),
    )
    if settings.peers:
        sources = Sources(coordinator=coordinator, claimant=url)
        stack.push_async_callback(_advertised(Advertiser(sources=sources, parts=holdings.parts)))
    taker = Taker(
        fetcher=fetcher,
        holdings=holdings,
        engine=service.engine,
        status=holder.status,
        folder=work,
        metrics=holder.metrics,
    )
    follower = Follower(
        coordinator=coordinator,
        taker=taker,
        status=holder.status,
        engine=service.engine,
        url=url,
        metrics=holder.metrics,
    )
    return follower


async def check_store(settings: ServerSettings) -> None:
    """Refuse a store of this server's own that nobody can open, before the model is loaded.

    Raises:
        ConfigError: its URL cannot be used.
    """
    if settings.store is not None:
        # One that is away, or says nothing, may come back.
        with contextlib.suppress(WeightsError, TimeoutError):
            async with asyncio.timeout(OPEN_S):
                reader = await in_daemon_thread(
                    open_store, settings.store, settings.run, token=settings.store_token
                )
            reader.close()


def _advertised(advertiser: Advertiser) -> Callable[[], Awaitable[None]]:
    """Advertise until what this returns is called."""
    task = asyncio.create_task(advertiser.run())

    async def end() -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await advertiser.leave()

    return end


def _folders(settings: ServerSettings, stack: contextlib.AsyncExitStack) -> tuple[Holdings, Path]:
    """Where versions lie, and where patches lie until the engine has read them: on a disk, not in memory."""
    try:
        if settings.weights_dir is None:
            made = Scratch(Path(tempfile.gettempdir()), "spoke-weights-")
            stack.callback(made.close)
            folder = made.folder
        else:
            folder = settings.weights_dir
            folder.mkdir(parents=True, exist_ok=True)
        holdings = Holdings(folder, settings.run)
        stack.callback(holdings.close)
        work = folder / f".work-{settings.run}"  # no run is called so
        shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
        work.mkdir()
    except OSError as error:
        raise ConfigError(f"--weights-dir {settings.weights_dir}: {error}") from None
    return holdings, work
