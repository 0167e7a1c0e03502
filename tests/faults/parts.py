"""The parts of a small fleet as real processes, and ways to break each of them.

- `Redis`: a real redis-server that can be killed and started again empty, on the same port.
- `Member`: a real `python -m server` that follows a run; it can be killed, stopped (SIGSTOP) and continued. Through
  `faulty_server.py` it stops at a named place inside itself and says so by a file.
- `FaultyStore`: a file server on a real socket that damages, cuts or withholds the files of a store as told.

Whatever a test does, nothing of it outlives the test.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from support import START_S, free_port

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], Any], what: str, bound_s: float = 30.0) -> Any:
    """The first true value of a condition; an AssertionError that says what never came."""
    deadline = time.monotonic() + bound_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if value := condition():
                return value
        assert time.monotonic() < deadline, f"not within {bound_s:g} s: {what}"
        time.sleep(0.02)


class Redis:
    """A redis-server without a disk: what it held is gone when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary is not None, "redis-server is not on the PATH"
        self._process = subprocess.Popen(
            [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return
        raise AssertionError("redis-server did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@dataclass
class Member:
    """One server of the fleet."""

    name: str
    url: str
    command: list[str]
    log: Path
    signs: Path
    """Folder in which `faulty_server` says where it stands, and in which a test says that it may go on."""
    faults: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = ENVIRONMENT | {
            "SPOKE_TEST_SIGNS": str(self.signs),
            "SPOKE_TEST_FAULTS": self.faults,
        }
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self.command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment, cwd=ROOT,
            )  # fmt: skip

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def reached(self, place: str, bound_s: float = 60.0) -> None:
        """Wait until the server stands at a place that its faults name."""
        until(lambda: (self.signs / place).exists(), f"{self.name} at {place}", bound_s)

    def go_on(self, place: str) -> None:
        (self.signs / f"{place}.go").touch()

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200
        return False

    def wait_ready(self) -> None:
        def look() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (
                f"{self.name} ended:\n{self.log.read_text()[-3000:]}"
            )
            return self.ready()

        until(look, f"{self.name} is ready", START_S)

    def live(self) -> dict[str, Any]:
        """What its memory holds now: version and hash of every live tensor."""
        answer = httpx.get(f"{self.url}/weights/live", timeout=30.0)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_version(self, version: int, bound_s: float = 60.0) -> None:
        def look() -> bool:
            answer = httpx.get(f"{self.url}/readyz", timeout=5.0)
            return answer.status_code == 200 and answer.json()["version"] >= version

        until(
            look, f"{self.name} serves version {version}:\n{self.log.read_text()[-2000:]}", bound_s
        )


@contextlib.contextmanager
def member(
    name: str,
    model: Path,
    folder: Path,
    redis_url: str,
    run: str,
    *arguments: str,
    faults: str = "",
) -> Iterator[Member]:
    """A server of the transformers engine, started; gone when the block ends.

    Args:
        name: in the fleet table.
        model: checkpoint.
        folder: takes its log, signs and weights.
        redis_url: of the run's Redis.
        run: that it follows.
        arguments: further ones of the command line; the last of two equal options counts.
        faults: places at which it stops, by commas; see `faulty_server`.
    """
    port, own = free_port(), folder / name
    signs = own / "signs"
    signs.mkdir(parents=True)
    program = [str(ROOT / "tests/faults/faulty_server.py")] if faults else ["-m", "server"]
    command = [
        sys.executable, *program, "--model", str(model), "--port", str(port), "--engine", "transformers",
        "--dtype", "bfloat16", "--redis-url", redis_url, "--run", run, "--server-id", name,
        "--reward-workers", "1", *arguments,
    ]  # fmt: skip
    found = Member(name, f"http://127.0.0.1:{port}", command, own / "log", signs, faults)
    found.start()
    try:
        yield found
    finally:
        found.end()


@dataclass
class FaultyStore:
    """Files of a folder over HTTP, some of them not as they are. Not the real file server: that one never lies.

    `rules` map a regular expression of the path to what happens; the first that fits counts, as often as it says.
    """

    root: Path
    rules: list["Rule"] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Every path that was asked for, in order."""
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def rule(self, pattern: str, kind: str, times: int = 1) -> None:
        """`kind`: missing (404), cut (half of it, then the connection ends), flip (one bit), truncate (short but whole),
        stall (half of it, then nothing until released)."""
        self.rules.append(Rule(re.compile(pattern), kind, times))

    def take(self, path: str) -> str:
        for rule in self.rules:
            if rule.times and rule.pattern.search(path):
                rule.times -= 1
                return rule.kind
        return ""

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """URL of the store."""
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                store.asked.append(self.path)
                with contextlib.suppress(ConnectionError):
                    store.answer(self)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = self.root / request.path.lstrip("/")
        kind = self.take(request.path)
        if not path.is_file() or kind == "missing":
            request.send_error(404)
            return
        data = path.read_bytes()
        if kind == "flip":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if kind == "truncate":
            data = data[: len(data) // 2]
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start = int(found[1])
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        body = data[start:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if kind in ("cut", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if kind == "stall":
                self.stalled.set()
                self.release.wait(120)
            else:
                request.connection.close()
                return
            body = body[len(body) // 2 :]
        request.wfile.write(body)


@dataclass
class Rule:
    """What a `FaultyStore` does to some paths."""

    pattern: re.Pattern[str]
    kind: str
    times: int


class Leader:
    """A process of `publishing.py`."""

    def __init__(self, *arguments: str, log: Path) -> None:
        command = [sys.executable, str(ROOT / "tests/faults/publishing.py"), *arguments]
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        self.said: list[dict[str, Any]] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def says(self, key: str, bound_s: float = 60.0, *, nth: int = 1) -> dict[str, Any]:
        """The n-th line that has a key, once it is there."""

        def look() -> dict[str, Any] | None:
            found = [line for line in list(self.said) if key in line]
            return found[nth - 1] if len(found) >= nth else None

        found: dict[str, Any] = until(
            look, f"{key} from the trainer; it said {self.said[-3:]}", bound_s
        )
        return found

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def publish(self, bound_s: float = 60.0) -> dict[str, Any]:
        """The next version, announced."""
        before = sum("weights_digest" in line for line in self.said)
        self.tell("publish")
        return self.says("weights_digest", bound_s, nth=before + 1)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                self.tell("quit")
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._reading.join(10)
        self.process.stdout.close()
        self._log.close()


def tensor_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a folder's safetensors files, read with the library and not with our code."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            bits = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(bits).hexdigest()
    return found
