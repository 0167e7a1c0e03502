"""A weight store over HTTP: the trainer's file server, another rollout server, or any server of plain files.

    GET {url}/{run}/v000042/manifest.json        GET {url}/{run}/v000042/NAME, with Range where a part is there

No answer is trusted: manifests and files are bounded in bytes and in time, and SHA-256 decides. That is also why
no `If-Range` is sent: a version's files never change, and where one did, its bytes are refused.
"""

import contextlib
import functools
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx

from shared.errors import AbsentError, ConfigError, LocalError, WeightsError
from shared.manifest import FileEntry, Manifest, check_run_name
from shared.receiving import Stop, StoppedError, receive, receive_all
from shared.retry_after import retry_after_s
from shared.store import MANIFEST, MANIFEST_BYTES, version_folder
from shared.store_url import VARIABLE, check_http, is_http, shown

CONNECT_S = 5.0
"""Bound of a connection's making."""
STALL_S = 15.0
"""How long a source may send no byte."""
PEER_STALL_S = 5.0
"""The same for another server: there are others to ask."""
SLOWEST = 32 << 10
"""Bytes a second that a source must send, on the whole of a file: one that drips is given up too."""
TRIES = 3
LONGEST_PAUSE_S = 5.0
"""Longest wait between two tries, whatever the source asks for."""
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})

T = TypeVar("T")


class _AgainError(WeightsError):
    """It may work in a moment."""

    def __init__(self, detail: str, pause_s: float | None = None) -> None:
        super().__init__(detail)
        self.pause_s = pause_s


class HttpStore:
    """A `WeightReader` over HTTP(S).

    Args:
        url: of the folder that has a folder for each run.
        run: name of the run.
        token: sent as a bearer token; None sends none.
        stall_s: how long a source may send no byte, seconds.
        tries: of each file and manifest; each goes on where the one before ended.

    Raises:
        ConfigError: the URL or the run cannot be used.
    """

    def __init__(
        self,
        url: str,
        run: str,
        *,
        token: str | None = None,
        stall_s: float = STALL_S,
        tries: int = TRIES,
    ) -> None:
        self.url = check_http(url)
        try:
            check_run_name(run)
        except ValueError as error:
            raise ConfigError(f"weight store {self.url!r}: {error}") from None
        self._run = run
        self._tries = tries
        headers = {"Accept-Encoding": "identity"}  # sizes and hashes are of the bytes as they are
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        # Redirects are not followed: the token is for this address alone.
        self._client = httpx.Client(
            headers=headers, timeout=httpx.Timeout(stall_s, connect=CONNECT_S), verify=_tls()
        )

    def close(self) -> None:
        """See `WeightReader.close`."""
        self._client.close()

    def manifest(self, version: int) -> Manifest:
        """See `WeightReader.manifest`."""

        def read() -> bytes:
            data = bytearray()
            with self._get(version, MANIFEST, 0, MANIFEST_BYTES) as (_, pieces):
                for piece in pieces:
                    data += piece
                    if len(data) > MANIFEST_BYTES:
                        raise WeightsError(f"it has more than {MANIFEST_BYTES} bytes")
            return bytes(data)

        try:
            data = self._with_tries(read, Stop(None))
        except WeightsError as error:
            raise _kind(error)(
                f"version {version} of run {self._run} has no readable manifest at {self.url}: {error}"
            ) from error
        return Manifest.decode(data, run=self._run, version=version)

    def fetch(
        self,
        manifest: Manifest,
        folder: Path,
        files: Sequence[FileEntry] | None = None,
        *,
        stop: threading.Event | None = None,
    ) -> tuple[Path, ...]:
        """See `WeightReader.fetch`."""
        version, ended = manifest.version, Stop(stop)

        def opened(
            entry: FileEntry, offset: int
        ) -> contextlib.AbstractContextManager[tuple[int, Iterable[bytes]]]:
            return self._get(version, entry.name, offset, entry.size)

        def one(entry: FileEntry) -> Path:
            try:
                return self._with_tries(lambda: receive(entry, folder, opened, ended), ended)
            except (LocalError, StoppedError):
                raise
            except OSError as error:  # of this disk: the network's are httpx' own
                raise LocalError(f"version {version}: {entry.name}: {error}") from error
            except WeightsError as error:
                raise _kind(error)(
                    f"version {version}: {entry.name} from {self.url}: {error}"
                ) from error

        return receive_all(manifest.files if files is None else files, one, ended)

    def _with_tries(self, call: Callable[[], T], stop: Stop) -> T:
        """The result of a call that is tried again where that may help."""
        for left in reversed(range(self._tries)):
            try:
                return call()
            except _AgainError as error:
                pause_s = 0.2 * 3 ** (self._tries - 1 - left)
                if left == 0 or stop.wait(min(error.pause_s or pause_s, LONGEST_PAUSE_S)):
                    raise
        raise AssertionError("there is at least one try")

    @contextlib.contextmanager
    def _get(
        self, version: int, name: str, offset: int, size: int
    ) -> Iterator[tuple[int, Iterable[bytes]]]:
        """Where the bytes of an answer start, and the bytes.

        Raises:
            WeightsError: the source has no such file, refuses us, or fails.
        """
        url = f"{self.url}/{self._run}/{version_folder(version)}/{name}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                start = _start(response, offset)
                yield start, _in_time(response, CONNECT_S + STALL_S + (size - start) / SLOWEST)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            if "WRONG_VERSION_NUMBER" in reason:
                reason = (
                    "no TLS is spoken there: write http://, or put a proxy that ends TLS in front"
                )
            raise _AgainError(f"the connection failed: {reason}") from error
        except (httpx.InvalidURL, UnicodeError) as error:  # a host that is no host's name
            raise WeightsError(f"its URL cannot be asked: {error}") from error


def open_peer(url: str, run: str, *, token: str | None = None) -> HttpStore:
    """The reader of what another server holds: asked once, and given up soon, since there are others to ask.

    Args:
        url: as that server advertises it, and its path.
        run: name of the run.
        token: bearer token.

    Raises:
        ConfigError: the URL or the run cannot be used.
    """
    if not is_http(url):
        raise ConfigError(f"server {shown(url)!r}: weights come over http(s) from other servers")
    return HttpStore(url, run, token=token, stall_s=PEER_STALL_S, tries=1)


def _kind(error: WeightsError) -> type[WeightsError]:
    """Of the error that says more of where this one happened."""
    return AbsentError if isinstance(error, AbsentError) else WeightsError


def _start(response: httpx.Response, offset: int) -> int:
    """Where an answer's bytes start.

    Raises:
        WeightsError: it is no answer that has them.
    """
    status = response.status_code
    if status == 200:
        return 0
    if status == 206:
        if response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            return offset
        raise WeightsError("it was answered with another range than asked for")
    if status in (401, 403):
        raise WeightsError(
            f"{status}: give its token, with what it needs to read weights, in {VARIABLE}"
        )
    if status == 404:
        raise AbsentError("404: it is not there")
    if status == 416:
        raise WeightsError(f"416: it has no more than {offset} bytes")
    detail = f"it was answered with status {status}"
    if status in _AGAIN:
        headers = response.headers
        asked = retry_after_s(headers.get("Retry-After"), now=time.time(), date=headers.get("Date"))
        raise _AgainError(detail, asked)
    raise WeightsError(detail)


def _in_time(response: httpx.Response, bound_s: float) -> Iterator[bytes]:
    """An answer's bytes as they come, as long as they come fast enough."""
    until = time.monotonic() + bound_s
    for piece in response.iter_raw():
        if time.monotonic() > until:
            raise WeightsError(f"it was not whole after {bound_s:.0f} s; the source is too slow")
        yield piece


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: it reads every root certificate."""
    return httpx.create_ssl_context()
