"""A weight store on any fsspec URL: a folder, or an object store.

Files first, the manifest last. Only this file touches fsspec.
"""

import contextlib
import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import fsspec
from fsspec.callbacks import Callback

from shared.digests import sha256_of
from shared.errors import ConfigError, LocalError, WeightsError
from shared.manifest import FileEntry, Manifest, check_run_name
from shared.receiving import FULL, PIECE, Opener, Stop, receive, receive_all
from shared.store import MANIFEST, MANIFEST_BYTES, version_folder, version_of
from shared.store_url import is_http, shown

_LOCAL = frozenset({"file", "local"})
_CREATES = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
"""Protocols whose fsspec implementation knows the exclusive mode `create`."""
_BLOCK = 8 << 20
"""Bytes that are asked of an object store at once."""


class FsspecStore:
    """A `WeightStore` on any fsspec URL (`file://`, `s3://`, `gs://`, `memory://`, …).

    Of two trainers that publish one version, the second fails: on local files its manifest is linked into place,
    which the system refuses where one is; on s3, gs and memory it is put with the condition that none is there.
    Other protocols have no such thing: there the store looks before it writes, and two who look at the same moment
    both write. The lease in Redis stands before all of this.

    Args:
        url: root of the store; a path without a scheme is a local folder.
        run: name of the run, a folder below the root.

    Raises:
        ConfigError: the URL's protocol is unknown, its package is not installed, or it can only be read.
        WeightsError: it connects at once, and cannot.
    """

    def __init__(self, url: str, run: str) -> None:
        self.given = url
        """As it was given, for those who open it themselves; `url` is for people."""
        self.url = shown(url)
        if is_http(url):
            raise ConfigError(
                f"weight store {self.url!r}: an HTTP store can only be read; write to the folder that it serves"
            )
        try:
            check_run_name(run)
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"weight store {self.url!r}: {error}") from None
        except OSError as error:
            reason = str(error) or type(error).__name__
            raise WeightsError(f"weight store {self.url} cannot be reached: {reason}") from error
        self._root = posixpath.join(root, run)
        self._run = run
        protocol = self._fs.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._local = bool(self._protocols & _LOCAL)

    @property
    def folder(self) -> Path | None:
        """The store's root as a folder of this machine; None where it is none."""
        return Path(self._root).parent if self._local else None

    @property
    def beside(self) -> Path | None:
        """See `WeightStore.beside`."""
        return Path(self._root) if self._local else None

    def close(self) -> None:
        """See `WeightReader.close`; fsspec keeps its own connections."""

    def _path(self, version: int, name: str = "") -> str:
        return posixpath.join(self._root, version_folder(version), name)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Errors of the store's own kind as ours."""
        try:
            yield
        except OSError as error:
            reason = str(error) or type(error).__name__
            if error.errno in FULL:
                reason += "; free some room, or lower fleet.keep_versions"
            raise WeightsError(f"weight store {self.url}: {what}: {reason}") from error

    def publish(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        before_manifest: Callable[[], None] = lambda: None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """See `WeightStore.publish`."""
        version = manifest.version
        extra = () if manifest.shortcut is None else manifest.shortcut.files
        with self._named(f"version {version}"):
            if self._fs.exists(self._path(version, MANIFEST)):
                raise self._taken(version)
            self._fs.makedirs(self._path(version), exist_ok=True)
            for entry in (*manifest.files, *extra):
                self._put(version, entry, folder / entry.name, moved)
                moved()
            before_manifest()
            # Last, and whole: a reader that sees the manifest must find every byte it names.
            try:
                self._create(self._path(version, MANIFEST), manifest.encode())
            except FileExistsError:
                raise self._taken(version) from None

    def _taken(self, version: int) -> WeightsError:
        return WeightsError(
            f"version {version} of run {self._run} is in the store already; "
            "a version number is never used for other bytes"
        )

    def _put(self, version: int, entry: FileEntry, source: Path, moved: Callable[[], None]) -> None:
        """Put one file, never over another one."""
        path = self._path(version, entry.name)
        if self._fs.exists(path):
            if self._fs.size(path) == entry.size and self._sha256(path) == entry.sha256:
                return
            raise WeightsError(
                f"version {version} of run {self._run} has another {entry.name} in the store already: a trainer "
                "died while it published, or one is publishing now; take the next number"
            )
        if not self._local:
            self._fs.put_file(str(source), path, callback=_Moved(moved))
            return
        with contextlib.suppress(FileExistsError):  # our double, just now: the manifest decides
            if source.is_relative_to(self._root):
                _sync(str(source))
                os.link(source, path)
                return
            with self._partial(path) as partial:
                self._fs.put_file(str(source), partial)
                _sync(partial)
                os.link(partial, path)

    def _create(self, path: str, data: bytes) -> None:
        """Make a file that is there whole or not at all.

        Raises:
            FileExistsError: there is one.
        """
        if self._local:
            with self._partial(path) as partial:
                self._fs.pipe_file(partial, data)
                _sync(partial)
                os.link(partial, path)
            _sync(posixpath.dirname(path))
        elif self._protocols & _CREATES:
            self._fs.pipe_file(path, data, mode="create")
        else:
            with self._partial(path) as partial:
                self._fs.pipe_file(partial, data)
                if self._fs.exists(path):
                    raise FileExistsError(path)
                self._fs.mv(partial, path)

    @contextlib.contextmanager
    def _partial(self, path: str) -> Iterator[str]:
        """A name beside a path that nobody else writes to; gone at the end."""
        partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        try:
            yield partial
        finally:
            if self._fs.exists(partial):
                self._fs.rm_file(partial)

    def _sha256(self, path: str) -> str:
        with self._fs.open(path, "rb") as stream:
            return sha256_of(iter(lambda: stream.read(PIECE), b""))

    def manifest(self, version: int) -> Manifest:
        """See `WeightReader.manifest`."""
        path = self._path(version, MANIFEST)
        try:
            if self._fs.size(path) > MANIFEST_BYTES:
                raise OSError(f"it has more than {MANIFEST_BYTES} bytes")
            data = self._fs.cat_file(path)
        except OSError as error:
            raise WeightsError(
                f"version {version} of run {self._run} has no readable manifest in {self.url}: {error}"
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

        def one(entry: FileEntry) -> Path:
            try:
                return receive(entry, folder, self._opener(version), ended)
            except LocalError:
                raise
            except (OSError, WeightsError) as error:
                reason = str(error) or type(error).__name__
                raise WeightsError(
                    f"version {version}: {entry.name} from {self.url}: {reason}"
                ) from error

        return receive_all(manifest.files if files is None else files, one, ended)

    def _opener(self, version: int) -> Opener:
        @contextlib.contextmanager
        def opened(entry: FileEntry, offset: int) -> Iterator[tuple[int, Iterable[bytes]]]:
            path = self._path(version, entry.name)
            with self._fs.open(path, "rb", block_size=_BLOCK) as stream:
                stream.seek(offset)
                yield offset, iter(lambda: stream.read(PIECE), b"")

        return opened

    def versions(self) -> list[int]:
        """See `WeightStore.versions`."""
        return [version for version in self.numbers() if self._has_manifest(version)]

    def _has_manifest(self, version: int) -> bool:
        with self._listed():
            try:
                # Neither `exists` nor `glob`: both take a store that is away for one that has nothing.
                self._fs.info(self._path(version, MANIFEST))
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def numbers(self) -> list[int]:
        """See `WeightStore.numbers`."""
        with self._listed():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:  # nothing was published yet
                return []
        return _numbers(str(path).rstrip("/") for path in found)

    def _listed(self) -> contextlib.AbstractContextManager[None]:
        remedy = "see that this machine reaches the store and may list it"
        return self._named(f"run {self._run} cannot be listed ({remedy})")

    def delete(self, version: int) -> None:
        """See `WeightStore.delete`."""
        with self._named(f"version {version}"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(version, MANIFEST))
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(version), recursive=True)


class _Moved(Callback):  # type: ignore[misc]  # fsspec has no types
    """Passes on that bytes have got there."""

    def __init__(self, moved: Callable[[], None]) -> None:
        super().__init__()
        self._moved = moved

    def call(self, *args: object, **kwargs: object) -> None:
        """Called by fsspec after each part."""
        self._moved()


def _numbers(paths: Iterable[str]) -> list[int]:
    found = (version_of(posixpath.basename(path)) for path in paths)
    return sorted(version for version in found if version is not None)


def _sync(path: str) -> None:
    """Local files reach the disk before anyone hears of them; object stores are durable on return."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
