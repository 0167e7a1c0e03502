"""A weight store on any fsspec URL: a folder, or an object store.

Files first, the manifest last.
"""

import contextlib
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from shared.digests import sha256_of
from shared.errors import ConfigError, LocalError, WeightsError
from shared.file_system import (
    OBJECTS,
    as_os_errors,
    explained,
    lacks_bucket,
    open_file_system,
    protocols,
)
from shared.manifest import FileEntry, Manifest, check_run_name
from shared.new_files import LOCAL, NewFiles
from shared.receiving import PIECE, Opener, Stop, receive, receive_all
from shared.store import MANIFEST, MANIFEST_BYTES, version_folder, version_of
from shared.store_url import is_http, shown

_BLOCK = 8 << 20
"""Bytes that are asked of an object store at once."""


class FsspecStore:
    """A `WeightStore` on any fsspec URL (`file://`, `s3://`, `gs://`, `memory://`, …).

    Of two trainers that publish one version, the second fails; `new_files` says how. Where that only looks before
    it writes, two who look at the same moment both write. The lease in Redis stands before all of this.

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
        except ValueError as error:
            raise ConfigError(f"weight store {self.url!r}: {error}") from None
        self._fs, root = open_file_system(url)
        self._root = posixpath.join(root, run)
        self._run = run
        self._local = bool(protocols(self._fs) & LOCAL)

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
    def _named(self, what: str, remedy: str = "") -> Iterator[None]:
        """Errors of the store's own kind as ours."""
        try:
            with self._errors():
                yield
        except OSError as error:
            raise WeightsError(
                f"weight store {self.url}: {what}: {explained(error, remedy)}"
            ) from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the store's own kind as OSErrors."""
        try:
            with as_os_errors():
                yield
        except PermissionError:
            if protocols(self._fs) & OBJECTS:  # credentials may come or change: look for them anew
                self._fs.clear_instance_cache()
                self._fs, _ = open_file_system(self.given)
            raise

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
            new = NewFiles(self._fs)
            new.folder(self._path(version))
            for entry in (*manifest.files, *extra):
                self._put(new, version, entry, folder / entry.name, moved)
                moved()
            before_manifest()
            # Last, and whole: a reader that sees the manifest must find every byte it names.
            try:
                new.create(self._path(version, MANIFEST), manifest.encode())
            except FileExistsError:
                raise self._taken(version) from None

    def _taken(self, version: int) -> WeightsError:
        return WeightsError(
            f"version {version} of run {self._run} is in the store already; "
            "a version number is never used for other bytes"
        )

    def _put(
        self,
        new: NewFiles,
        version: int,
        entry: FileEntry,
        source: Path,
        moved: Callable[[], None],
    ) -> None:
        """Put one file, never over another one."""
        path = self._path(version, entry.name)
        if not self._fs.exists(path):
            try:
                new.put(path, source, moved, link=source.is_relative_to(self._root))
                return
            except FileExistsError:
                pass  # our double's, just now; or ours, and the answer was lost
        if self._fs.size(path) != entry.size or self._sha256(path) != entry.sha256:
            raise WeightsError(
                f"version {version} of run {self._run} has another {entry.name} in the store already: a trainer "
                "died while it published, or one is publishing now; take the next number"
            )

    def _sha256(self, path: str) -> str:
        with self._fs.open(path, "rb") as stream:
            return sha256_of(iter(lambda: stream.read(PIECE), b""))

    def manifest(self, version: int) -> Manifest:
        """See `WeightReader.manifest`."""
        try:
            with self._errors():
                data = self._fs.cat_file(self._path(version, MANIFEST), end=MANIFEST_BYTES + 1)
            if len(data) > MANIFEST_BYTES:
                raise OSError(f"it has more than {MANIFEST_BYTES} bytes")
        except OSError as error:
            raise WeightsError(
                f"version {version} of run {self._run} has no readable manifest in {self.url}: {explained(error)}"
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
                with self._errors():
                    return receive(entry, folder, self._opener(version), ended)
            except LocalError:
                raise
            except (OSError, WeightsError) as error:
                reason = explained(error) if isinstance(error, OSError) else str(error)
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
            except FileNotFoundError as error:
                if lacks_bucket(error):
                    raise
                return []  # nothing was published yet
        return _numbers(str(path).rstrip("/") for path in found)

    def _listed(self) -> contextlib.AbstractContextManager[None]:
        remedy = "see that this machine reaches the store and may list it"
        return self._named(f"run {self._run} cannot be listed", remedy)

    def delete(self, version: int) -> None:
        """See `WeightStore.delete`."""
        with self._named(f"version {version}"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(version, MANIFEST))
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(version), recursive=True)


def _numbers(paths: Iterable[str]) -> list[int]:
    found = (version_of(posixpath.basename(path)) for path in paths)
    return sorted(version for version in found if version is not None)
