"""Versions that this server has fetched, on its own disk: what it loads, and what it hands to other servers.

    {folder}/{run}/v000042/FILES, manifest.json last

Nothing here changes once it is there, and nothing is used before its SHA-256 was found right in this process.
"""

from collections.abc import Sequence
from pathlib import Path

from shared.chain import Chain
from shared.manifest import FileEntry, Manifest


class Holdings:
    """A server's local store of fetched versions. One process at a time uses a folder.

    Everything here reads or writes files: call it in a thread (`server.threads.in_daemon_thread`).

    Args:
        folder: takes a folder of the run's name.
        run: name of the run.

    Raises:
        ConfigError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, run: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Let another process use the folder."""
        raise NotImplementedError

    def versions(self) -> tuple[int, ...]:
        """Versions whose files are here and verified, ascending: `ServerRecord.serves_files`. Quick."""
        raise NotImplementedError

    def manifest(self, version: int) -> Manifest | None:
        """The manifest of a held version. Quick."""
        raise NotImplementedError

    def folder_of(self, version: int) -> Path:
        """Where a version's files lie, or are to lie before `add`."""
        raise NotImplementedError

    def chain(self, version: int) -> Chain | None:
        """Anchor and deltas that make a version out of what is here; None where something is missing."""
        raise NotImplementedError

    def add(self, manifest: Manifest, files: Sequence[FileEntry]) -> None:
        """Make files that lie in `folder_of(manifest.version)`, or are held already, part of what is held.

        Raises:
            WeightsError: one of them has other bytes than its entry says; nothing is added.
        """
        raise NotImplementedError

    def complete(self, version: int, shards: Sequence[Path]) -> None:
        """Move an anchor's shards, written from this server's own chain, into the anchor that it took by its shortcut.

        Raises:
            WeightsError: their bytes are not those of the manifest; nothing is added.
        """
        raise NotImplementedError

    def prune(self, version: int) -> None:
        """Delete what no version from this one on needs: all below the anchor of its chain."""
        raise NotImplementedError

    def file(self, version: int, name: str) -> Path | None:
        """A held file, for a peer: one that the manifest names, or the manifest itself. Quick."""
        raise NotImplementedError
