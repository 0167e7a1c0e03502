"""Versions that this server has fetched, on its own disk: what it loads, and what it hands to other servers.

    {folder}/{run}/v000042/FILES, manifest.json last

Nothing here changes once it is there, and nothing is used before its SHA-256 was found right in this process.
Beside them lie the full weights of one version that this server wrote for itself (`server.rebuilt`).
"""

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from server.planning import parts_of
from server.rebuilt import Rebuilt
from shared.chain import Chain, Held
from shared.errors import ConfigError, RoomError, WeightsError
from shared.manifest import FileEntry, Manifest
from shared.receiving import FULL, holds
from shared.sources import Part
from shared.store import MANIFEST, version_folder, version_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """What is held of one version."""

    manifest: Manifest
    names: frozenset[str]
    """Of its files that are here and verified."""
    digest: str
    """Of its weights; to find it takes a hash of every tensor's."""

    @classmethod
    def of(cls, manifest: Manifest, names: Iterable[str]) -> Self:
        """With the digest found."""
        return cls(manifest=manifest, names=frozenset(names), digest=manifest.weights_digest)

    def has(self, files: Iterable[FileEntry]) -> bool:
        return self.names.issuperset(entry.name for entry in files)


class Holdings:
    """A server's local store of fetched versions. One process at a time uses a folder.

    Opening it hashes what is there, `complete` what it gets, and `rebuild` everything: call those, `add` and
    `prune` in a thread (`shared.threads.in_daemon_thread`). The others are quick, from any thread.

    Args:
        folder: takes a folder of the run's name.
        run: name of the run.

    Raises:
        ConfigError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.run = run
        self._root = folder / run
        self._changing = threading.Lock()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = (self._root / ".lock").open("w")
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"--weights-dir {folder}: {reason}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"--weights-dir {folder}: another server keeps run {run} there; give each its own"
            ) from None
        self._rebuilt = Rebuilt(self._root / ".rebuilt")  # no version is called so
        # Never changed in place: readers in other threads see one whole dictionary or the next.
        self._held: dict[int, _Version] = dict(self._read())

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()

    def _read(self) -> Iterable[tuple[int, _Version]]:
        """What an earlier process left: hashed again, since it may have been damaged meanwhile."""
        for folder in sorted(self._root.iterdir()):
            version = version_of(folder.name)
            if version is None or not (folder / MANIFEST).is_file():
                continue  # a fetch that was cut short: it is gone on with
            try:
                data = (folder / MANIFEST).read_bytes()
                manifest = Manifest.decode(data, run=self.run, version=version)
            except (OSError, WeightsError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            right = {e.name for e in _entries(manifest) if holds(folder / e.name, e)}
            yield version, _Version.of(manifest, right)

    def versions(self) -> tuple[int, ...]:
        """Versions whose delta or full files others can be given, ascending."""
        return tuple(sorted({version for version, _ in self.parts()}))

    def parts(self) -> frozenset[tuple[int, Part]]:
        """Which files of which versions others can be given: of an anchor by its shortcut, not the full ones."""
        return frozenset(
            (version, part)
            for version, held in self._held.items()
            for part, files in parts_of(held.manifest)
            if files and held.has(files)
        )

    def manifest(self, version: int) -> Manifest | None:
        """The manifest of a held version."""
        held = self._held.get(version)
        return None if held is None else held.manifest

    def folder_of(self, version: int) -> Path:
        """Where a version's files lie."""
        return self._root / version_folder(version)

    def chain(self, version: int) -> Chain | None:
        """The shortest chain that makes a version out of what is here; None where something is missing.

        It starts from an anchor, or from what this server has rebuilt.
        """
        whole = self._chain(version)
        return None if whole is None else self._rebuilt.shortened(whole)

    def _chain(self, version: int) -> Chain | None:
        """From an anchor on."""
        found = self._way(version)
        if found is None:
            return None
        links = [
            Held(manifest=held.manifest, folder=self.folder_of(held.manifest.version))
            for held in found
        ]
        try:
            return Chain(anchor=links[0], deltas=tuple(links[1:]))
        except WeightsError:  # its tensors are not those of its base: it needs an anchor
            return None

    def makes(self, version: int, digest: str) -> bool:
        """Can the version with these weights be made out of what is here?"""
        held = self._held.get(version)
        return held is not None and held.digest == digest and self._way(version) is not None

    def _way(self, version: int) -> list[_Version] | None:
        """An anchor and the deltas that lead to a version."""
        way: list[_Version] = []
        digest: str | None = None
        while True:
            held = self._held.get(version)
            if held is None or digest not in (None, held.digest):
                return None
            way.append(held)
            manifest, step = held.manifest, held.manifest.delta
            if manifest.is_anchor and held.has(manifest.files):
                return way[::-1]
            if step is None or not held.has(step.files):
                return None
            version, digest = step.base_version, step.base_digest

    def incoming(self, manifest: Manifest) -> Path:
        """Folder for a version's files until `add`; what was held of other bytes of that number is dropped."""
        version = manifest.version
        held = self._held.get(version)
        if held is not None and held.manifest.digest != manifest.digest:
            self.forget(version)
        folder = self.folder_of(version)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._failed(version, error) from None
        return folder

    def adopt(self, manifest: Manifest) -> None:
        """Hold a version under another manifest of its number; files that both name stay, the others are deleted.

        A run that was trained anew from the same weights has such manifests: they differ in their time at least.

        Raises:
            WeightsError: it cannot be written; everything is as it was.
        """
        version, named = manifest.version, _entries(manifest)
        with self._changing:
            held = self._held.get(version)
            if held is None or held.manifest.digest == manifest.digest:
                return
            before = [e for e in _entries(held.manifest) if e.name in held.names]
            kept = {entry.name for entry in before if entry in named}
            folder = self.folder_of(version)
            self._write(manifest, folder)
            self._held = {**self._held, version: _Version.of(manifest, kept)}
            for entry in before:
                if entry.name not in kept:
                    (folder / entry.name).unlink(missing_ok=True)

    def add(self, manifest: Manifest, files: Sequence[FileEntry]) -> None:
        """Hold files that lie in `incoming(manifest)`, as `shared.receiving.receive` has verified them.

        Raises:
            WeightsError: the manifest cannot be written; nothing is added.
        """
        folder = self.folder_of(manifest.version)
        names = frozenset(entry.name for entry in files)
        with self._changing:
            held = self._held.get(manifest.version)
            if held is None:
                self._write(manifest, folder)
                held = _Version.of(manifest, ())
            grown = replace(held, names=held.names | names)
            self._held = {**self._held, manifest.version: grown}

    def _write(self, manifest: Manifest, folder: Path) -> None:
        """Last of all, and whole: what a process that was killed leaves behind must not look finished."""
        partial = folder / f"{MANIFEST}.partial"
        try:
            partial.write_bytes(manifest.encode())
            partial.replace(folder / MANIFEST)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._failed(manifest.version, error) from None

    def complete(self, version: int, shards: Sequence[Path]) -> None:
        """Move an anchor's shards, which this server wrote from its own chain, into what it took by a shortcut.

        Raises:
            WeightsError: their bytes are not those of the manifest, or there is no room; nothing is added.
        """
        manifest = self.manifest(version)
        if manifest is None:
            raise WeightsError(f"version {version} is not held")
        found = {path.name: path for path in shards}
        for entry in manifest.files:
            if entry.name not in found or not holds(found[entry.name], entry):
                raise WeightsError(
                    f"version {version}: {entry.name} was written here with other bytes than published"
                )
        try:
            for entry in manifest.files:
                shutil.move(found[entry.name], self.folder_of(version) / entry.name)
        except OSError as error:
            raise self._failed(version, error) from None
        self.add(manifest, manifest.files)

    def abandon(self, version: int) -> None:
        """Delete what is there of a version without being held: the parts of a fetch that found no room."""
        with self._changing:
            held, folder = self._held.get(version), self.folder_of(version)
            kept = frozenset() if held is None else held.names | {MANIFEST}
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in kept:
                    path.unlink(missing_ok=True)
            if not kept:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def rebuild(self, version: int) -> None:
        """Write the full weights of a version for this server alone, where its chain has become long.

        Raises:
            WeightsError: something is damaged, or there is no room; everything is as it was.
        """
        chain = self.chain(version)
        if chain is not None:
            self._rebuilt.write(chain)

    def forget_rebuilt(self) -> None:
        """Delete the weights that `rebuild` wrote: they are wrong, or in the way."""
        self._rebuilt.forget()

    def prune(self, version: int) -> None:
        """Delete what no version from this one on needs: all below the anchor of its chain."""
        chain = self._chain(version)
        if chain is None:
            return
        self._rebuilt.keep(chain)
        floor = chain.anchor.manifest.version
        for path in list(self._root.iterdir()):
            number = version_of(path.name)
            if number is not None and number < floor:
                self.forget(number)

    def forget(self, version: int) -> None:
        """Delete a version's files, so that they are fetched again: its manifest first."""
        with self._changing:
            self._held = {v: held for v, held in self._held.items() if v != version}
            folder = self.folder_of(version)
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def file(self, version: int, name: str) -> Path | None:
        """A held file, for a peer: one that the manifest names, or the manifest itself."""
        held = self._held.get(version)
        if held is None or not (name in held.names or (name == MANIFEST and held.names)):
            return None
        return self.folder_of(version) / name

    def _failed(self, version: int, error: OSError) -> WeightsError:
        reason = error.strerror or str(error)
        detail = f"version {version}: {os.fspath(self._root)}: {reason}"
        if error.errno in FULL:
            return RoomError(f"{detail}; free some room, or give another --weights-dir")
        return WeightsError(detail)


def _entries(manifest: Manifest) -> tuple[FileEntry, ...]:
    """Every file that a manifest names."""
    return manifest.files + (() if manifest.shortcut is None else manifest.shortcut.files)
