"""What tests share beyond fixtures: ports, real server processes, and applications on real sockets."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
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

    def status(self, text: str) -> None:
        pass

    def step(self, done: int, total: int, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def measured(self, label: str, measurement: Any) -> None:
        self.measured_labels.append(label)
