"""The weight store: `{store}/{run}/v000042/` on any fsspec URL, made visible by its manifest.

Only this file touches fsspec. A store never changes a version that has a manifest.
"""

import contextlib
import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import fsspec
from fsspec.callbacks import Callback

from shared.digests import sha256_of
from shared.errors import ConfigError, LocalError, SpokeError, WeightsError
from shared.manifest import FileEntry, Manifest, check_run_name
from shared.receiving import FULL, PIECE, Opener, Stop, receive, receive_all
from shared.store_url import is_http, shown

MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20
"""No manifest is longer."""
_LOCAL = frozenset({"file", "local"})
_CREATES = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
"""Protocols whose fsspec implementation knows the exclusive mode `create`."""
_BLOCK = 8 << 20
"""Bytes that are asked of an object store at once."""


def version_folder(version: int) -> str:
    """Name of a version's folder.

    >>> version_folder(42)
    'v000042'
    """
    return f"v{version:06d}"


def version_of(name: str) -> int | None:
    """The version whose folder is called so; None for any other name.

    >>> version_of("v000042"), version_of("v1234567"), version_of("v42"), version_of("vx")
    (42, 1234567, None, None)
    """
    digits = name[1:]
    sound = name[:1] == "v" and digits.isascii() and digits.isdigit()
    return int(digits) if sound and version_folder(int(digits)) == name else None


class WeightReader(Protocol):
    """Whoever hands out the bytes of a run's versions: a store, or a server that holds some of them."""

    url: str
    """For people: without user and password."""

    def manifest(self, version: int) -> Manifest:
        """The version's manifest, checked.

        Raises:
            WeightsError: missing or damaged.
        """
        ...

    def fetch(
        self,
        manifest: Manifest,
        folder: Path,
        files: Sequence[FileEntry] | None = None,
        *,
        stop: threading.Event | None = None,
    ) -> tuple[Path, ...]:
        """Bring files of a version into `folder`, a few at a time, and verify size and SHA-256 of each.

        What a fetch that failed has brought is gone on with by the next one into the same folder.

        Args:
            manifest: of the version.
            folder: is made where it is not there.
            files: of `manifest.files`, or of its shortcut; None for all of `manifest.files`.
            stop: given up soon after it is set.

        Raises:
            RoomError: the disk is full.
            WeightsError: a file is missing or its bytes are wrong.
        """
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class WeightStore(WeightReader, Protocol):
    """Where the bytes of a run's versions live."""

    @property
    def beside(self) -> Path | None:
        """A folder of this machine out of which files are linked into the store, and not copied; None where the
        store is elsewhere. What lies there is no version."""
        ...

    def publish(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        before_manifest: Callable[[], None] = lambda: None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a version visible: its files first, its manifest last, and only once.

        Args:
            manifest: sealed; names the files, those of its shortcut included.
            folder: where the files lie on this machine.
            before_manifest: called between the two; what it raises leaves the version invisible.
            moved: called whenever something has got there, a file or, in most stores, a part of one.

        Raises:
            WeightsError: the version exists already, or the store refused.
        """
        ...

    def versions(self) -> list[int]:
        """Versions that have a manifest, ascending: asks for each.

        Raises:
            WeightsError: the store is away; a version is never left out for that.
        """
        ...

    def numbers(self) -> list[int]:
        """Versions that have a folder, ascending: a trainer that died while it published left one without a
        manifest, and its number is not used again. One listing.

        Raises:
            WeightsError: the store is away.
        """
        ...

    def delete(self, version: int) -> None:
        """Remove a version, or what is there of one, its manifest first; nothing happens where there is none.

        Raises:
            WeightsError: the store is away, or refused.
        """
        ...


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
            with _as_os_errors(ValueError, ImportError):
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
            with _as_os_errors():
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
        with self._named(f"version {version}"):
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
            with _as_os_errors():
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
            with contextlib.ExitStack() as stack:
                with _as_os_errors():
                    stream = stack.enter_context(self._fs.open(path, "rb", block_size=_BLOCK))
                    stream.seek(offset)

                def read() -> bytes:
                    with _as_os_errors():
                        return bytes(stream.read(PIECE))

                yield offset, iter(read, b"")

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


@contextlib.contextmanager
def _as_os_errors(*known: type[Exception]) -> Iterator[None]:
    """What a store's package raises, as OSError: botocore has errors of its own for a bucket that is away."""
    try:
        yield
    except (OSError, SpokeError, *known):
        raise
    except (
        Exception
    ) as error:  # edge to a package of the user's choice: it must not end a server or a run
        raise OSError(str(error).strip() or type(error).__name__) from error


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
