"""The process that vLLM runs in: how it starts, and that it ends with its engine, whatever ends that."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from faults.parts import until
from support import START_S

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
import asyncio, json, multiprocessing, os, signal, sys
import httpx
from server.engines import vllm, vllm_start
from server.engines.base import GenerateRequest
from server.engines.settings import EngineSettings
from shared.errors import EngineError

request = GenerateRequest(prompt_token_ids=(5, 6), samples=2, max_tokens=500, temperature=1.0, seed=0)

async def failure(awaited):
    try:
        await awaited
    except EngineError:
        return "EngineError"

async def main():
    method = vllm_start.start_method()
    engine = await vllm.open_engine(EngineSettings(model=sys.argv[1], dtype="float32", kv_cache_gib=0.1))
    (worker,) = multiprocessing.active_children()
    print(json.dumps({"method": method, "worker": worker.pid}), flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    lost = []
    if sys.argv[2] == "lose":
        app = await engine.openai_app("tiny")  # while it is imported the loop goes on, and requests would end
        pending = asyncio.create_task(engine.generate(request))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60)
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}
        post = lambda: client.post("/v1/completions", json=body)
        asked = asyncio.create_task(post())
        while engine._running < 2:
            await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGKILL)
        lost = [await failure(pending), await failure(engine.check()), await failure(engine.generate(request))]
        lost += [(await asked).status_code, (await post()).status_code]
    await engine.close()
    await engine.close()
    left = [child.name for child in multiprocessing.active_children()]
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    left += [name for name in names if name.startswith("ZMQ")]
    print(json.dumps({"lost": lost, "left": left, "closed": await failure(engine.generate(request))}))

asyncio.run(main())
"""


@contextlib.contextmanager
def program(model: Path, what: str) -> Iterator[subprocess.Popen]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM", "SPOKE"))}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), what],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # the engine's process goes with it


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


@pytest.mark.parametrize(
    ("what", "lost"), [("close", []), ("lose", ["EngineError"] * 3 + [503, 503])]
)
def test_an_engine_ends_with_its_process_alive_or_lost(tiny_math, what, lost):
    with program(tiny_math, what) as process:
        out, error = process.communicate(timeout=200)
    first, last = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert first["method"] == "fork"  # the quick start, in a process that has one thread
    assert last == {"lost": lost, "left": [], "closed": "EngineError"}
    assert process.returncode == 0
    assert gone(first["worker"], 5)
    if what == "close":
        assert "Traceback" not in error


def test_a_server_that_is_killed_takes_its_engine_with_it(tiny_math):
    with program(tiny_math, "wait") as process:
        worker = json.loads(process.stdout.readline())["worker"]
        process.send_signal(signal.SIGKILL)
    assert gone(worker, 10)


@contextlib.contextmanager
def loading(model: Path, log: Path, method: str = "") -> Iterator[tuple[subprocess.Popen, int]]:
    """The command as it is shipped, with no word on threads, its engine's process not there yet; its port."""
    own = ("VLLM", "SPOKE", "OMP_", "OPENBLAS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {"SPOKE_VLLM_START": method} if method else {}
    argv = ["--model", str(model), "--engine", "vllm", "--kv-cache-gib", "0.1", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [sys.executable, "-m", "server", *argv, str(port)],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=stream,
        ) as process,
    ):
        try:
            yield process, port
        finally:
            process.kill()


def engine_of(
    server: subprocess.Popen, meanwhile: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """The process of a server's engine, as soon as it is there, and how it was started."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")

    def look() -> tuple[int, str] | None:
        assert server.poll() is None, "the server ended"
        meanwhile()
        for child in children.read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if command.startswith(
                b"VLLM::EngineCore"
            ):  # its title, once it is vLLM's own code that runs
                return int(child), "fork"
            if b"spawn_main" in command:
                return int(child), "spawn"
        return None

    return until(look, "vLLM's process is there", START_S)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_server_killed_while_it_loads_leaves_no_engine_and_no_port(tiny_math, tmp_path, method):
    with loading(tiny_math, tmp_path / "log", method) as (server, port):
        engine, found = engine_of(server)
        server.kill()
        server.wait()
        try:
            assert found == method
            # A spawned one imports first, holding nothing.
            assert gone(engine, 5 if method == "fork" else 60)
            socket.create_server(("127.0.0.1", port)).close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)


def test_a_connection_from_before_the_engine_ends_when_the_server_closes_it(tiny_math, tmp_path):
    """uvicorn closes an idle one after 5 seconds; a forked engine that had a copy would keep it open."""
    with loading(tiny_math, tmp_path / "log") as (server, port):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
            until(lambda: client.get("/livez").is_success, "it answers", START_S)
        with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=15)) as connection:

            def ask() -> None:
                connection.request("GET", "/livez")
                assert connection.getresponse().read()

            engine, found = engine_of(server, ask)
            assert found == "fork"  # the quick start
            assert connection.sock.recv(1) == b""
        assert not gone(engine, 0)
