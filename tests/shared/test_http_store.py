"""A store over HTTP: the trainer's file server, and sources that break in every way, on real sockets.

1. What is fetched is what was published, however often the connection breaks; no byte is asked for twice.
2. A source that stalls, drips, sends too much, another range or wrong bytes is given up; one line says so.
3. The token goes to the store alone, and no error shows it.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import on_a_socket
from versions import RUN, Versions

from shared import http_store
from shared.errors import AbsentError, ConfigError, LocalError, WeightsError
from shared.fsspec_store import FsspecStore
from shared.http_store import HttpStore, open_peer
from shared.manifest import Manifest
from shared.open_store import open_store
from trainer.file_server import create_app

TOKEN = "store-0123456789abcdef"


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    made = Versions(tmp_path)
    made.publish()
    made.publish()
    return made


@contextlib.contextmanager
def raw_server(answer: Callable[[bytes, socket.socket], None]) -> Iterator[str]:
    """URL of a server that does to each connection whatever a test wants; one request a connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(4096)
                answer(request, connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def header(request: bytes, name: bytes) -> bytes:
    found = [line for line in request.split(b"\r\n") if line.lower().startswith(name + b":")]
    return found[0].partition(b":")[2].strip() if found else b""


def start_of(request: bytes) -> int:
    asked = header(request, b"range")
    return int(asked.removeprefix(b"bytes=").removesuffix(b"-")) if asked else 0


def whole(data: bytes, start: int = 0, extra: bytes = b"") -> bytes:
    """Head and body of a sound answer."""
    status = (
        f"206 P\r\nContent-Range: bytes {start}-{len(data) - 1}/{len(data)}" if start else "200 OK"
    )
    body = data[start:] + extra
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def fetch(
    url: str, manifest: Manifest, folder: Path, *, tries: int = 3, stall_s: float = 5.0
) -> list[bytes]:
    with contextlib.closing(HttpStore(url, RUN, tries=tries, stall_s=stall_s)) as store:
        return [path.read_bytes() for path in store.fetch(manifest, folder, manifest.files[:1])]


async def test_what_was_published_is_fetched(versions: Versions, tmp_path: Path) -> None:
    def work(port: int) -> None:
        store = open_store(f"http://127.0.0.1:{port}/", RUN, token=TOKEN)
        with contextlib.closing(store):
            for manifest in versions.manifests:
                assert store.manifest(manifest.version) == manifest
                paths = store.fetch(manifest, tmp_path / f"{manifest.version}")
                made = versions.folder(manifest.version)
                assert [p.read_bytes() for p in paths] == [
                    (made / entry.name).read_bytes() for entry in manifest.files
                ]
            with pytest.raises(WeightsError, match=r"version 9 .* 404: it is not there"):
                store.manifest(9)

    async with on_a_socket(create_app(versions.root, TOKEN)) as port:
        await asyncio.to_thread(work, port)


@pytest.mark.parametrize("token", [None, "another-0123456789abcdef"])
async def test_a_wrong_token_is_said_and_not_shown(versions: Versions, token: str | None) -> None:
    def work(port: int) -> None:
        with contextlib.closing(HttpStore(f"http://127.0.0.1:{port}", RUN, token=token)) as store:
            with pytest.raises(WeightsError, match=r"401: give its token, .* SPOKE_STORE") as e:
                store.manifest(0)
            assert "another" not in str(e.value)

    async with on_a_socket(create_app(versions.root, TOKEN)) as port:
        await asyncio.to_thread(work, port)


def test_a_cut_connection_is_gone_on_with(versions: Versions, tmp_path: Path) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    starts: list[int] = []

    def cutting(request: bytes, connection: socket.socket) -> None:
        starts.append(start_of(request))
        answer = whole(data, starts[-1])
        connection.sendall(answer[:100_000] if len(starts) < 3 else answer)

    with raw_server(cutting) as url:
        assert fetch(url, manifest, tmp_path / "got") == [data]
    assert starts[0] == 0
    assert starts[1] > 90_000
    assert starts[2] > starts[1] + 90_000


def test_a_fetch_that_gave_up_is_gone_on_with_by_the_next(
    versions: Versions, tmp_path: Path
) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    starts: list[int] = []

    def cutting(request: bytes, connection: socket.socket) -> None:
        starts.append(start_of(request))
        connection.sendall(whole(data, starts[-1])[: 200_000 if len(starts) == 1 else None])

    with raw_server(cutting) as url:
        with pytest.raises(WeightsError, match=r"weights-0\.safetensors from http://.* connection"):
            fetch(url, manifest, tmp_path / "got", tries=1)
        assert fetch(url, manifest, tmp_path / "got", tries=1) == [data]
    assert starts[1] > 190_000


def test_a_source_that_knows_no_ranges_starts_again(versions: Versions, tmp_path: Path) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    cut = [100_000, None]

    def rangeless(request: bytes, connection: socket.socket) -> None:
        connection.sendall(whole(data)[: cut.pop(0)])

    with raw_server(rangeless) as url:
        assert fetch(url, manifest, tmp_path / "got") == [data]


def test_a_busy_source_is_asked_again_when_it_says(versions: Versions, tmp_path: Path) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    came: list[float] = []

    def busy(request: bytes, connection: socket.socket) -> None:
        came.append(time.monotonic())
        full = b"HTTP/1.1 429 Full\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(full if len(came) == 1 else whole(data))

    with raw_server(busy) as url:
        assert fetch(url, manifest, tmp_path / "got") == [data]
    assert came[1] - came[0] > 0.9


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda data, start: whole(data[:-1]), "ends after 299999 bytes, not 300000"),
        (lambda data, start: whole(data, extra=b"x"), "has more than 300000 bytes"),
        (
            lambda data, start: whole(bytes([data[0] ^ 1]) + data[1:]),
            "has other bytes than its manifest says",
        ),
        (
            lambda data, start: (
                b"HTTP/1.1 302 F\r\nLocation: http://other/\r\nContent-Length: 0\r\n\r\n"
            ),
            "answered with status 302",
        ),
        (lambda data, start: b"HTTP/1.1 500 E\r\nContent-Length: 0\r\n\r\n", "status 500"),
        (lambda data, start: b"not http at all\r\n\r\n", "the connection failed"),
    ],
    ids=["truncated", "too much", "bit flipped", "redirect", "error", "noise"],
)
def test_a_broken_source_is_named(
    versions: Versions, tmp_path: Path, answer: Callable[[bytes, int], bytes], reason: str
) -> None:
    manifest = versions.manifests[0]
    entry = manifest.files[0]
    data = (versions.folder(0) / entry.name).read_bytes()

    def broken(request: bytes, connection: socket.socket) -> None:
        connection.sendall(answer(data, start_of(request)))

    with raw_server(broken) as url, pytest.raises(WeightsError) as error:
        fetch(url, manifest, tmp_path / "got", tries=2)
    assert reason in str(error.value)
    assert f"version 0: {entry.name} from {url}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "got" / entry.name).exists()


def test_a_range_that_was_not_asked_for_is_refused(versions: Versions, tmp_path: Path) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / f"{manifest.files[0].name}.part").write_bytes(data[:5000])

    def other(request: bytes, connection: socket.socket) -> None:
        connection.sendall(whole(data, 4000))

    with raw_server(other) as url, pytest.raises(WeightsError, match="another range"):
        fetch(url, manifest, tmp_path / "got")


def test_a_stalling_source_is_given_up(versions: Versions, tmp_path: Path) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    given_up = threading.Event()

    def stalling(request: bytes, connection: socket.socket) -> None:
        connection.sendall(whole(data)[:1000])
        given_up.wait(20)

    started = time.monotonic()
    with raw_server(stalling) as url:
        with pytest.raises(WeightsError, match="connection failed"):
            fetch(url, manifest, tmp_path / "got", tries=1, stall_s=0.3)
        assert time.monotonic() - started < 10
        given_up.set()


def test_a_dripping_source_is_given_up(
    versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, and yet it would take for ever."""
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    monkeypatch.setattr(http_store, "CONNECT_S", 0.2)
    monkeypatch.setattr(http_store, "STALL_S", 0.2)
    monkeypatch.setattr(http_store, "SLOWEST", 1 << 20)
    given_up = threading.Event()

    def dripping(request: bytes, connection: socket.socket) -> None:
        answer = whole(data)
        for at in range(len(answer)):
            connection.sendall(answer[at : at + 1])
            if given_up.wait(0.01):
                return

    with raw_server(dripping) as url:
        with pytest.raises(WeightsError, match="the source is too slow"):
            fetch(url, manifest, tmp_path / "got")
        given_up.set()


def test_a_manifest_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_store, "MANIFEST_BYTES", 100_000)

    def endless(request: bytes, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(65_536))

    with (
        raw_server(endless) as url,
        contextlib.closing(HttpStore(url, RUN)) as store,
        pytest.raises(WeightsError, match="more than 100000 bytes"),
    ):
        store.manifest(0)


def test_a_fetch_that_nobody_wants_any_more_ends(versions: Versions, tmp_path: Path) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    stop = threading.Event()

    def stopped_halfway(request: bytes, connection: socket.socket) -> None:
        connection.sendall(whole(data)[:100_000])
        stop.set()
        connection.sendall(whole(data)[100_000:])

    with (
        raw_server(stopped_halfway) as url,
        contextlib.closing(HttpStore(url, RUN)) as store,
        pytest.raises(WeightsError, match="given up"),
    ):
        store.fetch(manifest, tmp_path / "got", manifest.files[:1], stop=stop)
    assert not (tmp_path / "got" / manifest.files[0].name).exists()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://", "write http"),
        ("http://host:x", "write http"),
        ("http://host/a b", "write http"),
        ("http://host/?key=secret", "write http"),
        ("http://me:secret@host", "SPOKE_STORE_TOKEN, not in the URL"),
    ],
)
def test_unusable_urls_are_named_without_secrets(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        HttpStore(url, RUN)
    assert "secret" not in str(error.value)


def test_the_url_chooses_the_store(tmp_path: Path) -> None:
    assert isinstance(open_store(f"file://{tmp_path}", RUN), FsspecStore)
    with contextlib.closing(open_store("https://host/store/", RUN)) as store:
        assert isinstance(store, HttpStore)
        assert store.url == "https://host/store"


def test_a_server_that_stands_still_is_given_up_soon(
    versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the connection and answers nothing: asked once, unlike a store."""
    assert http_store.PEER_STALL_S <= 5
    monkeypatch.setattr(http_store, "PEER_STALL_S", 0.3)
    asked: list[bytes] = []
    given_up = threading.Event()

    def still(request: bytes, connection: socket.socket) -> None:
        asked.append(request)
        given_up.wait(20)

    with raw_server(still) as url:
        with (
            contextlib.closing(open_peer(url, RUN)) as other,
            pytest.raises(WeightsError, match="connection failed"),
        ):
            other.fetch(versions.manifests[0], tmp_path / "got", versions.manifests[0].files[:1])
        given_up.set()
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["ftp://host", "/a/path", "memory://x", "http://", "http://a b"])
def test_servers_are_asked_over_http_alone(url: str) -> None:
    with pytest.raises(ConfigError):
        open_peer(url, RUN)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example", "xn--a", "[::1"])
def test_a_host_that_is_no_hosts_name_is_an_error_of_ours(host: str) -> None:
    with (
        pytest.raises((WeightsError, ConfigError)),
        contextlib.closing(open_peer(f"http://{host}/weights", RUN)) as other,
    ):
        other.manifest(0)


async def test_what_is_not_there_is_told_from_what_fails(
    versions: Versions, tmp_path: Path
) -> None:
    missing = versions.manifests[0].files[0].model_copy(update={"name": "other"})

    def work(port: int) -> None:
        with contextlib.closing(HttpStore(f"http://127.0.0.1:{port}", RUN)) as store:
            with pytest.raises(AbsentError, match="other from http"):
                store.fetch(versions.manifests[0], tmp_path / "got", [missing])
            with pytest.raises(AbsentError, match="version 9"):
                store.manifest(9)

    async with on_a_socket(create_app(versions.root, None)) as port:
        await asyncio.to_thread(work, port)


def test_what_this_disk_refuses_is_not_the_sources_fault(
    versions: Versions, tmp_path: Path
) -> None:
    manifest = versions.manifests[0]
    data = (versions.folder(0) / manifest.files[0].name).read_bytes()
    (tmp_path / "got").write_text("a file where the folder belongs")
    with (
        raw_server(lambda request, connection: connection.sendall(whole(data))) as url,
        pytest.raises(LocalError),
    ):
        fetch(url, manifest, tmp_path / "got")
