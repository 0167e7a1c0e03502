"""The parts of a small fleet as real processes, and ways to break each of them.

- `support.RedisProcess`: a real redis-server that can be killed and started again empty, on the same port.
- `Member`: a real server process that follows a run; it can be killed, stopped (SIGSTOP) and continued. By
  `faulty_server` it stops at a named place inside itself and says so by a file.
- `FaultyStore`: a file server on a real socket that damages, cuts or withholds the files of a store as told.

Whatever a test does, nothing of it outlives the test.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
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


def until(condition: Callable[[], Any], what: str, bound_s: float = 30.0) -> Any:
    """The first true value of a condition; an AssertionError that says what never came."""
    deadline = time.monotonic() + bound_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if value := condition():
                return value
        assert time.monotonic() < deadline, f"not within {bound_s:g} s: {what}"
        time.sleep(0.02)


LEASE_S = 4.0
"""Of the trainers here: what a dead one leaves is waited for, and 10 s each time would be long."""


def run_server(argv: list[str], log: str, faults: str, signs: str) -> None:
    """A server's process: `python -m server`, or the one that stands still at places."""
    _own_output(log)
    os.environ["SPOKE_TEST_FAULTS"], os.environ["SPOKE_TEST_SIGNS"] = faults, signs
    from server.__main__ import main

    if faults:
        from faults.faulty_server import install

        install()
    sys.exit(main(argv))


def run_leader(argv: list[str], log: str, orders: Any, words: Any) -> None:
    """The process of a trainer that only publishes."""
    _own_output(log)
    from faults.publishing import main

    from shared import coordination

    coordination.LEASE_S = LEASE_S
    main(argv, orders, words)


def run_trainer(argv: list[str], log: str, redis_url: str) -> None:
    """A trainer's process: `spoke train`."""
    _own_output(log)
    os.environ["SPOKE_REDIS_URL"] = redis_url
    from shared import coordination
    from trainer.cli import main

    coordination.LEASE_S = LEASE_S
    sys.exit(main(argv))


def _own_output(log: str) -> None:
    with Path(log).open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def processes() -> Any:
    """Starts processes as forks of one that has imported what takes long: seconds less for each of them."""
    # Python 3.11's fork server does not take its parent's sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.preload"])
    return context


@dataclass
class Member:
    """One server of the fleet."""

    name: str
    url: str
    argv: list[str]
    log: Path
    signs: Path
    """Folder in which `faulty_server` says where it stands, and in which a test says that it may go on."""
    faults: str = ""
    process: Any = None

    def start(self) -> None:
        arguments = (self.argv, str(self.log), self.faults, str(self.signs))
        self.process = processes().Process(target=run_server, args=arguments)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.exitcode is None

    def send(self, number: signal.Signals) -> None:
        send(self.process, number)

    def end(self) -> None:
        end(self.process)

    def reached(self, place: str, bound_s: float = 60.0) -> int:
        """Wait until the server stands at a place that its faults name; the process that stands there."""
        until(lambda: (self.signs / place).exists(), f"{self.name} at {place}", bound_s)
        return int((self.signs / place).read_text())

    def stand_at(self, place: str) -> None:
        """Let the server, which has faults, stand at a place when it comes there next."""
        for old in (place, f"{place}.go"):
            (self.signs / old).unlink(missing_ok=True)
        (self.signs / f"{place}.stand").touch()

    def go_on(self, place: str) -> None:
        (self.signs / f"{place}.go").touch()

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200
        return False

    def wait_ready(self) -> None:
        def look() -> bool:
            assert self.running, f"{self.name} ended:\n{self.log.read_text()[-3000:]}"
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
    argv = [
        "--model", str(model), "--port", str(port), "--engine", "transformers",
        "--dtype", "bfloat16", "--redis-url", redis_url, "--run", run, "--server-id", name,
        "--reward-workers", "1", *arguments,
    ]  # fmt: skip
    found = Member(name, f"http://127.0.0.1:{port}", argv, own / "log", signs, faults)
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
        """`kind`: missing (404), cut (half of it, then the connection ends), flip (one bit), truncate (short but
        whole), stall (half of it, then nothing until released)."""
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
                request.connection.shutdown(
                    socket.SHUT_RDWR
                )  # close alone leaves rfile's hold on it
                request.close_connection = True
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
    """A process of `publishing`: a trainer as far as the fleet can see one."""

    def __init__(self, *argv: str, log: Path) -> None:
        context = processes()
        self._orders, orders = context.Pipe()
        words, said = context.Pipe(duplex=False)
        self.process = context.Process(target=run_leader, args=(list(argv), str(log), orders, said))
        self.process.start()
        orders.close()
        said.close()
        self.said: list[dict[str, Any]] = []
        self._reading = threading.Thread(target=self._read, args=(words,), daemon=True)
        self._reading.start()

    def _read(self, words: Any) -> None:
        with contextlib.suppress(EOFError), words:
            while True:
                self.said.append(words.recv())

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
        self._orders.send(word)

    def publish(self, bound_s: float = 60.0) -> dict[str, Any]:
        """The next version, announced."""
        before = sum("weights_digest" in line for line in self.said)
        self.tell("publish")
        return self.says("weights_digest", bound_s, nth=before + 1)

    def send(self, number: signal.Signals) -> None:
        send(self.process, number)

    def end(self) -> None:
        if self.process.exitcode is None:
            with contextlib.suppress(OSError):
                self.tell("quit")
        end(self.process)
        self._orders.close()
        self._reading.join(10)


def send(process: Any, number: signal.Signals) -> None:
    """Send a signal; one that kills has killed when this returns."""
    os.kill(process.pid, number)
    if number is signal.SIGKILL:
        process.join()


def end(process: Any) -> None:
    """End a process, whatever state it is in."""
    if process.exitcode is not None:
        return
    os.kill(process.pid, signal.SIGCONT)
    process.terminate()
    process.join(20)
    if process.exitcode is None:
        process.kill()
        process.join()
