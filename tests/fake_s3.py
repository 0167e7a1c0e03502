"""A fake S3: moto's emulator in a process of its own, on a real socket; and a line to it that can be disturbed.

It keeps objects in memory, knows conditions (`If-None-Match`), ranges and multipart uploads, and checks no
signature: whoever sends one is let in.
"""

import contextlib
import http.client
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=none"
}
SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
DENIED = (403, "AccessDenied", "Access Denied")


@dataclass(frozen=True)
class FakeS3:
    """One that runs.

    Args:
        url: of the server.
    """

    url: str

    def bucket(self) -> str:
        """A new bucket's name."""
        name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.ask("PUT", name)
        return name

    def ask(self, method: str, path: str, data: bytes = b"") -> bytes:
        """A request beside every store; raises where it is refused."""
        answer = httpx.request(method, f"{self.url}/{path}", content=data, headers=SIGNED)
        return answer.raise_for_status().content


def credentials(endpoint: str) -> dict[str, str]:
    """The environment of a process that uses a fake S3, and finds nothing of this machine's own."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


@contextlib.contextmanager
def running_fake_s3() -> Iterator[FakeS3]:
    """One that runs while the block does."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield FakeS3(f"http://127.0.0.1:{int(process.stdout.readline())}")
        process.stdin.close()  # it ends with it


@dataclass
class Line:
    """A line to a server that does as it is told. Requests are counted as they come.

    Args:
        url: of this end.
    """

    url: str
    refuse: int = 0
    """So many of the next requests are refused; -1 for all."""
    refusal: tuple[int, str, str] = SLOW_DOWN
    """By which status, code and message."""
    silent: bool = False
    """Requests are taken, and never answered."""
    cut_at: int | None = None
    """The next answer with a body from this byte of a file ends in its middle."""
    deaf_to: str = ""
    """The next PUT of a file of this name is done, and its answer is lost."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of each."""
    largest: int = 0
    """Bytes of the longest body that went either way."""
    ended: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str, name: str) -> int:
        """Requests for a file."""
        return sum(
            m == method and path.split("?")[0].endswith(name) for m, path, _ in self.requests
        )


@contextlib.contextmanager
def line_to(target: str) -> Iterator[Line]:
    """A line to a server, while the block runs."""
    host = target.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def carry(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            line.requests.append((self.command, self.path, self.headers.get("Range", "")))
            line.largest = max(line.largest, len(body))
            if line.silent:
                line.ended.wait()
                self.close_connection = True
            elif line.refuse:
                line.refuse -= 1
                status, code, message = line.refusal
                text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
                self.answer(status, [("Content-Type", "application/xml")], text.encode())
            else:
                self.forward(body)

        def forward(self, body: bytes) -> None:
            with contextlib.closing(http.client.HTTPConnection(host, timeout=30)) as far:
                far.request(self.command, self.path, body, dict(self.headers))
                found = far.getresponse()
                data = found.read()
            line.largest = max(line.largest, len(data))
            if self.command == "PUT" and line.deaf_to and self.path.endswith(line.deaf_to):
                line.deaf_to, self.close_connection = "", True
                return
            skipped = ("transfer-encoding", "connection", "content-length")
            headers = [(k, v) for k, v in found.getheaders() if k.lower() not in skipped]
            size = (
                int(found.headers["Content-Length"] or 0) if self.command == "HEAD" else len(data)
            )
            if self.headers.get("Range", "").startswith(f"bytes={line.cut_at}-"):
                line.cut_at, self.close_connection = None, True
                data = data[: len(data) // 2]
            self.answer(found.status, headers, data, size)

        def answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, size: int | None = None
        ) -> None:
            self.send_response_only(status)
            for name, value in [
                *headers,
                ("Content-Length", str(len(data) if size is None else size)),
            ]:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = carry

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        line = Line(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield line
        finally:
            line.ended.set()
            server.shutdown()
            thread.join()
