"""Calls to a store that may be away, or hang: each has a bound, and a thread that nobody waits for at the end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import ParamSpec, TypeVar

from shared.errors import ConfigError, CoordinationError, LeaseError, WeightsError
from shared.fsspec_store import FsspecStore
from shared.manifest import Manifest
from shared.store import WeightStore
from shared.threads import in_daemon_thread

P = ParamSpec("P")
T = TypeVar("T")

RETRY_S = 1.0
STILL_S = 10.0
"""A store that does not move for so long is spoken of."""


class StoreHangsError(WeightsError):
    """A store neither answers nor refuses."""


def check_folder(store: FsspecStore, name: str) -> None:
    """Refuse a store's folder that cannot be written to, which would else be waited for.

    Args:
        store: of any kind; one that is no folder of this machine passes.
        name: of the setting, for the message.

    Raises:
        ConfigError: naming it.
    """
    if store.folder is None:
        return
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=store.folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} {store.folder}: {error.strerror}; give a folder that can be written to"
        ) from None


async def asked(
    what: str, bound_s: float, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """The result of a call to a store.

    Args:
        what: is asked, for the message.
        bound_s: longest wait.
        call: runs in a thread; one that hangs is left behind.

    Raises:
        StoreHangsError: the bound is over.
    """
    try:
        async with asyncio.timeout(bound_s) as bound:
            return await in_daemon_thread(call, *args, **kwargs)
    except TimeoutError as error:
        if not bound.expired():
            raise
        raise StoreHangsError(f"{what} has not answered for {bound_s:g} s") from error


async def patiently(
    call: Callable[[], Awaitable[T]], what: str, *, wait_s: float, status: Callable[[str], None]
) -> T:
    """The result of a call, made again for `wait_s`: a Redis or a store that is away comes back.

    Args:
        call: may be made again.
        what: waits, for the message.
        wait_s: bound of the wait.
        status: told why it waits.

    Raises:
        LeaseError: another trainer has the run.
        WeightsError: the store refused, or was away for longer.
        CoordinationError: Redis was away for longer.
    """
    deadline, said = time.monotonic() + wait_s, ""
    while True:
        try:
            return await call()
        except LeaseError:
            raise
        except (CoordinationError, WeightsError) as error:
            # A store that is away is an OSError below; any other refusal would be the same again.
            refused = isinstance(error, WeightsError) and not isinstance(error.__cause__, OSError)
            if refused or time.monotonic() > deadline:
                raise
            if str(error) != said:
                said = str(error)
                status(f"{what} waits: {said}")
        await asyncio.sleep(min(RETRY_S, wait_s / 10))


async def write(
    store: WeightStore,
    manifest: Manifest,
    folder: Path,
    *,
    check: Callable[[], Awaitable[None]],
    still_s: float,
    status: Callable[[str], None],
) -> None:
    """Write a version: its files, then `check`, then its manifest.

    A store may be slow: the bound is of the time in which nothing moves. Cancelled, or once the bound is over, the
    thread that writes is left behind, and makes no manifest any more.

    Args:
        store: takes it.
        manifest: sealed.
        folder: has the files.
        check: called on this loop before the manifest; what it raises leaves the version invisible.
        still_s: longest time in which nothing moves; `check` has a bound of its own.
        status: told when the store has not moved for `STILL_S`.

    Raises:
        StoreHangsError: the bound is over.
        WeightsError: the store refused, or is away.
    """
    loop, given_up = asyncio.get_running_loop(), threading.Event()
    name = f"weight store {store.url}: version {manifest.version}"
    try:
        async with asyncio.timeout(still_s) as bound:
            watch = _Watch(
                bound, still_s, lambda s: status(f"{name}: nothing has moved for {s:g} s")
            )

            async def checked() -> None:
                watch.stop()
                await check()
                watch.moved()

            def before_manifest() -> None:
                if given_up.is_set():  # a thread cannot be stopped in any other place
                    raise LeaseError(f"version {manifest.version} is given up")
                asyncio.run_coroutine_threadsafe(checked(), loop).result()

            def moved() -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: left behind
                    loop.call_soon_threadsafe(watch.moved)

            watch.moved()
            try:
                await in_daemon_thread(
                    store.publish, manifest, folder, before_manifest=before_manifest, moved=moved
                )
            finally:
                given_up.set()
                watch.stop()
    except TimeoutError as error:
        if not bound.expired():
            raise
        raise StoreHangsError(f"{name}: nothing has moved for {still_s:g} s") from error


class _Watch:
    """A bound that moves on with the work."""

    def __init__(
        self, bound: asyncio.Timeout, still_s: float, still: Callable[[float], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound, self._still_s, self._still = bound, still_s, still
        self._saying: asyncio.TimerHandle | None = None

    def moved(self) -> None:
        """Count from now."""
        self.stop()
        with contextlib.suppress(RuntimeError):  # it is over: somebody left behind still works
            self._bound.reschedule(self._loop.time() + self._still_s)
            if self._still_s > STILL_S:
                self._saying = self._loop.call_later(STILL_S, self._still, STILL_S)

    def stop(self) -> None:
        """Count no more."""
        if self._saying is not None:
            self._saying.cancel()
            self._saying = None
        with contextlib.suppress(RuntimeError):
            self._bound.reschedule(None)
