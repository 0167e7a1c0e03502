"""The file server as a child process of the trainer: started, watched, started again, ended with it."""

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from shared.errors import ConfigError
from shared.fsspec_store import FsspecStore
from shared.store_url import check_announced
from trainer.launch import free_port
from trainer.settings import FleetSettings

log = logging.getLogger("spoke.store")

START_S = 30.0
STOP_S = 5.0
AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where the file server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As servers ask for it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def address(serve_at: str, advertise: str | None) -> Address:
    """Where to listen.

    Args:
        serve_at: `HOST:PORT`; port 0 takes a free one.
        advertise: how servers reach it, if that is another URL.

    Raises:
        ConfigError: it is no address, or servers could not know how to reach it.
    """
    host, colon, port = serve_at.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65_535):
        raise ConfigError(f"fleet.serve_at {serve_at!r}: write HOST:PORT, such as 0.0.0.0:8100")
    if host in ("0.0.0.0", "::") and advertise is None:
        raise ConfigError(
            f"fleet.serve_at {serve_at}: say in fleet.advertise_store how servers reach it, such as "
            f"http://trainer.example:{port}"
        )
    return Address(host, int(port) or free_port())


@contextlib.asynccontextmanager
async def announced(
    settings: FleetSettings, store: FsspecStore, folder: Path
) -> AsyncIterator[str]:
    """URL under which servers find a store, which is served over HTTP meanwhile if the settings say so.

    Args:
        settings: `serve_at` and `advertise_store`.
        store: that the trainer writes to.
        folder: of the run; takes the file server's log.

    Raises:
        ConfigError: the store is no folder here, or cannot be served so; or the URL carries a password.
    """
    url = check_announced(
        settings.advertise_store or store.given, "set fleet.advertise_store to its URL without"
    )
    if settings.serve_at is None:
        yield url
        return
    if store.folder is None:
        raise ConfigError(
            f"fleet.serve_at: {store.url} is no folder of this machine; leave serve_at out, "
            "servers reach that store by themselves"
        )
    at = address(settings.serve_at, settings.advertise_store)
    async with serving(store.folder, at, folder / "store.log"):
        yield settings.advertise_store or at.url


@contextlib.asynccontextmanager
async def serving(root: Path, at: Address, log_file: Path) -> AsyncIterator[None]:
    """Serve a folder while the block runs; a file server that ends is started again.

    Args:
        root: of the store.
        at: where to listen.
        log_file: takes what it says.

    Raises:
        ConfigError: it does not start; the message has its last line.
    """
    process = _start(root, at, log_file)
    watch: asyncio.Task[None] | None = None
    running = [process]
    try:
        await _answers(process, at, log_file)
        watch = asyncio.create_task(_watch(running, root, at, log_file))
        yield
    finally:
        if watch is not None:
            watch.cancel()
        _stop(running[0])


def _start(root: Path, at: Address, log_file: Path) -> subprocess.Popen[bytes]:
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer.cli", "store", str(root), "--with-stdin"]
    command += ["--host", at.host, "--port", str(at.port)]
    with log_file.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # ends when we end, whatever ends us
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _answers(process: subprocess.Popen[bytes], at: Address, log_file: Path) -> None:
    """Wait until it answers.

    Raises:
        ConfigError: it ended, or said nothing in time.
    """
    host = "127.0.0.1" if at.host == "0.0.0.0" else "::1" if at.host == "::" else at.host
    url = f"{Address(host, at.port).url}/livez"
    until = time.monotonic() + START_S
    async with httpx.AsyncClient(timeout=START_S, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).text.strip() == str(process.pid):
                    return  # not somebody else's answer
            if process.poll() is not None or time.monotonic() > until:
                raise ConfigError(
                    f"fleet.serve_at: the file server does not start: {_last_line(log_file)}"
                )
            await asyncio.sleep(0.05)


def _last_line(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


async def _watch(
    running: list[subprocess.Popen[bytes]], root: Path, at: Address, log_file: Path
) -> None:
    """Start it again whenever it ends: servers wait for it meanwhile, or fetch from one another."""
    said = ""
    while True:
        await asyncio.sleep(AGAIN_S)
        code = running[0].poll()
        if code is None:
            continue
        stdin = running[0].stdin
        assert stdin is not None
        stdin.close()
        try:
            running[0] = _start(root, at, log_file)
        except OSError as error:  # too many processes or open files, a full disk: that may pass
            if str(error) != said:
                said = str(error)
                log.warning("the file server ended with code %d; not started again: %s", code, said)
            continue
        said = ""
        log.warning("the file server ended with code %d; started again (%s)", code, log_file)
