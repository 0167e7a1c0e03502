"""What a weight store is: `{store}/{run}/v000042/`, made visible by its manifest.

A store never changes a version that has a manifest. `fsspec_store` reads and writes one on any fsspec URL,
`http_store` reads one over HTTP.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from shared.manifest import FileEntry, Manifest

MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20
"""No manifest is longer."""


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
