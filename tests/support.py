"""What tests share beyond fixtures: ports, real server processes, and applications on real sockets."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

START_S = 120.0


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisProcess:
    """A real redis-server that can be killed and started again on the same port, empty each time."""

    def __init__(self, folder: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Return once it answers."""
        binary = shutil.which("redis-server")
        assert binary is not None, (
            "redis-server is not on the PATH: `make setup` installs it by apt when run as root"
        )
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder]
        self._process = subprocess.Popen([binary, *own], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return
        raise AssertionError("redis-server ended")

    def kill(self) -> None:
        """As by `kill -9`; nothing happens where it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@contextlib.contextmanager
def running_redis() -> Iterator[RedisProcess]:
    """A Redis of a test's own."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisProcess(folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@dataclass(frozen=True)
class ServerProcess:
    """A real `python -m server` on a real socket."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"the server is not ready:\n{self.log.read_text()}")


@contextlib.contextmanager
def running_server(model: Path, log: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server process that is ready when the block begins and gone when it ends."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "server",
        "--model",
        str(model),
        "--port",
        str(port),
        *arguments,
    ]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
    server = ServerProcess(url=f"http://127.0.0.1:{port}", process=process, log=log)
    try:
        server.wait_ready()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def on_a_socket(app: ASGIApp, listener: socket.socket | None = None) -> AsyncIterator[int]:
    """Port of a real uvicorn with an application, in this process."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with listener or socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        yield int(listener.getsockname()[1])
        server.should_exit = True
        await asyncio.wait_for(task, 10)


class Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.measured_labels: list[str] = []
        self.said: list[str] = []

    def status(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, done: int, total: int, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def measured(self, label: str, measurement: Any) -> None:
        self.measured_labels.append(label)


@contextlib.contextmanager
def stalls() -> Iterator[Callable[[], float]]:
    """Longest time in the block for which this process did not run, seconds: what a machine adds to any wait."""
    worst, ended = 0.0, threading.Event()

    def look() -> None:
        nonlocal worst
        while not ended.is_set():
            before = time.monotonic()
            ended.wait(0.01)
            worst = max(worst, time.monotonic() - before - 0.01)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: worst
    finally:
        ended.set()
        thread.join()
