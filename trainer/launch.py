"""Starts Redis and rollout servers on this machine, and ends them with us, whatever happens.

The children are told by the kernel to end when this process dies (Linux), so that even `kill -9` leaves nothing.
"""

import asyncio
import contextlib
import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, CoordinationError
from trainer.settings import LaunchSettings
from trainer.stopping import terminated_as_interrupted

START_S = 30.0
STOP_S = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """What runs on this machine for us."""

    redis_url: str
    redis_kind: str
    """`redis-server`, or `fakeredis` where there is none."""
    servers: tuple[subprocess.Popen[bytes], ...]


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Runs in the child before it becomes the program."""
    with contextlib.suppress(
        OSError, AttributeError
    ):  # not Linux: the parent's own clean-up must do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _spawn(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone: we end the children in order
            preexec_fn=_die_with_parent,  # no thread runs yet
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_redis(folder: Path) -> tuple[subprocess.Popen[bytes], str, str]:
    """A Redis on a free port; (process, URL, kind)."""
    port = free_port()
    binary = shutil.which("redis-server")
    if binary is not None:
        command = [
            binary,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(folder),
        ]
        kind = "redis-server"
    else:
        code = f"from fakeredis import TcpFakeServer; TcpFakeServer(('127.0.0.1', {port})).serve_forever()"
        command, kind = [sys.executable, "-c", code], "fakeredis"
    process = _spawn(command, folder / "redis.log")
    url = f"redis://127.0.0.1:{port}/0"
    asyncio.run(_wait_for_redis(url, process, folder / "redis.log"))
    return process, url, kind


async def _wait_for_redis(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    coordinator = RedisCoordinator(url, "start")
    deadline = time.monotonic() + START_S
    try:
        while True:
            try:
                await coordinator.ping()
            except CoordinationError:
                _check_alive(process, "Redis", log)
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
            else:
                return
    finally:
        await coordinator.close()


def _check_alive(process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    if process.poll() is not None:
        lines = log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        raise ConfigError(f"{name} ended with code {process.returncode}: {last} (log: {log})")


def server_command(
    model: str, run: str, redis_url: str, number: int, launch: LaunchSettings
) -> list[str]:
    """The command line of one server, as anyone would type it."""
    return [
        sys.executable, "-m", "server",
        "--model", model,
        "--engine", launch.engine,
        "--dtype", launch.dtype,
        "--port", "0",
        "--redis-url", redis_url,
        "--run", run,
        "--server-id", f"server-{number}",
        *launch.arguments,
    ]  # fmt: skip


@contextlib.contextmanager
def local_fleet(model: str, run: str, launch: LaunchSettings, folder: Path) -> Iterator[Local]:
    """Redis and servers as processes of their own, ended when the block is left, for whatever reason.

    Args:
        model: checkpoint that the servers start from.
        run: name of the run.
        launch: how many servers, of which engine.
        folder: takes the logs.

    Raises:
        ConfigError: one of them does not start; it names the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    with terminated_as_interrupted():
        try:
            redis, url, kind = start_redis(folder)
            started.append(redis)
            for number in range(1, launch.servers + 1):
                command = server_command(model, run, url, number, launch)
                started.append(_spawn(command, folder / f"server-{number}.log"))
            local = Local(redis_url=url, redis_kind=kind, servers=tuple(started[1:]))
            asyncio.run(_wait_for_servers(local, run, folder))
            yield local
        finally:
            # Servers before Redis: they take themselves off the fleet table.
            _stop(started[1:])
            _stop(started[:1])


async def _wait_for_servers(local: Local, run: str, folder: Path) -> None:
    coordinator = RedisCoordinator(local.redis_url, run)
    try:
        while sum(r.state.serves for r in await coordinator.servers()) < len(local.servers):
            for number, process in enumerate(local.servers, start=1):
                _check_alive(process, f"server {number}", folder / f"server-{number}.log")
            await asyncio.sleep(0.1)
    finally:
        await coordinator.close()
