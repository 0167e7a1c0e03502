"""The weight store: `{store}/{run}/v000042/` on any fsspec URL, made visible by its manifest.

Only this file touches fsspec. A store never changes a version that has a manifest.
"""

import os
import posixpath
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import fsspec

from shared.digests import file_sha256
from shared.errors import ConfigError, WeightsError
from shared.manifest import FileEntry, Manifest, check_run_name

MANIFEST = "manifest.json"


class WeightStore(Protocol):
    """Where the bytes of a run's versions live."""

    def publish(self, manifest: Manifest, folder: Path) -> None:
        """Make a version visible: its files first, its manifest last.

        Args:
            manifest: sealed; names the files.
            folder: where the files lie on this machine.

        Raises:
            WeightsError: the version exists already, or the store refused.
        """
        ...

    def manifest(self, version: int) -> Manifest:
        """The version's manifest, checked.

        Raises:
            WeightsError: missing or damaged.
        """
        ...

    def fetch(self, manifest: Manifest, folder: Path) -> tuple[Path, ...]:
        """Copy a version's files into `folder` and verify size and SHA-256 of each.

        Raises:
            WeightsError: a file is missing or its bytes are wrong; `folder` is removed.
        """
        ...

    def versions(self) -> list[int]:
        """Versions that have a manifest, ascending."""
        ...

    def delete(self, version: int) -> None:
        """Remove a version, its manifest first; nothing happens where there is none."""
        ...


class FsspecStore:
    """A `WeightStore` on any fsspec URL (`file://`, `s3://`, `gs://`, `memory://`, …).

    Args:
        url: root of the store; a path without a scheme is a local folder.
        run: name of the run, a folder below the root.

    Raises:
        ConfigError: the URL's protocol is unknown or its package is not installed.
    """

    def __init__(self, url: str, run: str) -> None:
        try:
            check_run_name(run)
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"weight store {url!r}: {error}") from None
        self._root = posixpath.join(root, run)
        self._run = run
        self.url = url

    def _path(self, version: int, name: str = "") -> str:
        return posixpath.join(self._root, f"v{version:06d}", name)

    def publish(self, manifest: Manifest, folder: Path) -> None:
        """See `WeightStore.publish`."""
        version = manifest.version
        try:
            if self._fs.exists(self._path(version, MANIFEST)):
                raise WeightsError(
                    f"version {version} of run {self._run} is in the store already; "
                    "a version number is never used for other bytes"
                )
            self._fs.makedirs(self._path(version), exist_ok=True)
            for entry in manifest.files:
                self._fs.put_file(str(folder / entry.name), self._path(version, entry.name))
            self._sync([self._path(version, entry.name) for entry in manifest.files])
            # Last, and by rename: a reader that sees the manifest must find every byte it names.
            partial = self._path(version, MANIFEST + ".partial")
            self._fs.pipe_file(partial, manifest.encode())
            self._sync([partial])
            self._fs.mv(partial, self._path(version, MANIFEST))
        except OSError as error:
            raise WeightsError(f"weight store {self.url}: version {version}: {error}") from error

    def _sync(self, paths: Sequence[str]) -> None:
        """Local files reach the disk before anyone hears of them; object stores are durable on return."""
        if "file" not in self._fs.protocol:
            return
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def manifest(self, version: int) -> Manifest:
        """See `WeightStore.manifest`."""
        try:
            data = self._fs.cat_file(self._path(version, MANIFEST))
        except OSError as error:
            raise WeightsError(
                f"version {version} of run {self._run} has no readable manifest in {self.url}: {error}"
            ) from error
        return Manifest.decode(data, run=self._run, version=version)

    def fetch(self, manifest: Manifest, folder: Path) -> tuple[Path, ...]:
        """See `WeightStore.fetch`."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return tuple(
                self._fetch_file(manifest.version, entry, folder) for entry in manifest.files
            )
        except (OSError, WeightsError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"version {manifest.version}: {error}") from error

    def _fetch_file(self, version: int, entry: FileEntry, folder: Path) -> Path:
        path = folder / entry.name
        self._fs.get_file(self._path(version, entry.name), str(path))
        size = path.stat().st_size
        if size != entry.size:
            raise WeightsError(
                f"version {version}: {entry.name} has {size} bytes, not {entry.size}"
            )
        if file_sha256(path) != entry.sha256:
            raise WeightsError(
                f"version {version}: {entry.name} has other bytes than its manifest says"
            )
        return path

    def versions(self) -> list[int]:
        """See `WeightStore.versions`."""
        self._fs.invalidate_cache()
        found = self._fs.glob(posixpath.join(self._root, "v*", MANIFEST))
        names = (posixpath.basename(posixpath.dirname(str(path)))[1:] for path in found)
        return sorted(int(name) for name in names if name.isdigit())

    def delete(self, version: int) -> None:
        """See `WeightStore.delete`."""
        if self._fs.exists(self._path(version, MANIFEST)):
            self._fs.rm_file(self._path(version, MANIFEST))
        if self._fs.exists(self._path(version)):
            self._fs.rm(self._path(version), recursive=True)
