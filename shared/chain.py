"""From an anchor and the deltas after it to the newest weights, verified before anyone sees them.

Tensor by tensor: the anchor's values, each delta's changes over them, and SHA-256 against the newest manifest.
Only the largest tensor and what changed in it are ever in memory. What comes out is either full shards, or a patch
for somebody who holds an earlier version of the chain: every element that any delta since then names, with its
value of now. One pass gives both. A tensor that is wrong ends the pass; what was written by then is the caller's
to delete.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.delta import Indices, Patch, decode, index_type
from shared.delta_file import DeltaFiles
from shared.errors import WeightsError
from shared.manifest import DeltaEntry, FileEntry, Manifest, TensorEntry
from shared.patch_file import PatchWriter
from shared.shards import ShardWriter, canonical_order
from shared.tensor_files import TensorFiles, TensorInfo, sha256_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A version whose files lie on this machine: an anchor's shards, or those of a delta, or both."""

    manifest: Manifest
    folder: Path
    """Where the files lie, under the names that the manifest gives them."""
    rebuilt: tuple[Path, ...] = ()
    """Full shards of any version that this machine wrote for itself: they stand in for an anchor's. Nobody hashes
    them: what is built upon them is hashed."""

    @property
    def shards(self) -> tuple[Path, ...]:
        """Full shards; none where there are only those of a delta."""
        if self.rebuilt or not self.manifest.is_anchor:
            return self.rebuilt
        return tuple(self.folder / file.name for file in self.manifest.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """An anchor, or what was rebuilt, and the versions after it, each taken by its delta from the one before.

    Raises:
        WeightsError: they do not follow on one another.
    """

    anchor: Held
    """Whose `shards` are there: what everything starts from."""
    deltas: tuple[Held, ...] = ()
    """Ascending; their `manifest.delta.files` lie in their folders. An anchor stands here by its shortcut."""

    def __post_init__(self) -> None:
        if not self.anchor.manifest.is_anchor and not self.anchor.rebuilt:
            raise WeightsError(f"version {self.anchor.manifest.version} is no anchor")
        before = self.anchor.manifest
        for manifest in (held.manifest for held in self.deltas):
            step = _step(manifest)
            if (step.base_version, step.base_digest) != (before.version, before.weights_digest):
                raise WeightsError(
                    f"version {manifest.version} starts from version {step.base_version} "
                    f"({step.base_digest[:12]}), not from version {before.version} "
                    f"({before.weights_digest[:12]})"
                )
            if _infos(manifest) != _infos(before):
                raise WeightsError(
                    f"version {manifest.version} has other tensors than version {before.version}"
                )
            before = manifest

    @property
    def manifest(self) -> Manifest:
        """Of the newest version."""
        return (self.deltas[-1] if self.deltas else self.anchor).manifest

    def since(self, digest: str) -> int | None:
        """How many deltas lead to the newest version of the chain with these weights; None where it has none."""
        digests = [held.manifest.weights_digest for held in (self.anchor, *self.deltas)]
        return max((i for i, found in enumerate(digests) if found == digest), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchAndShards:
    """What one pass over a chain wrote."""

    patch: tuple[Path, ...] | None
    """As of `write_patch`."""
    shards: tuple[FileEntry, ...]
    """The newest version's canonical shards."""


def write_full(chain: Chain, folder: Path) -> tuple[Path, ...]:
    """Full shards of the newest version, every tensor verified: for this machine alone.

    Args:
        chain: leads to it.
        folder: takes them. Where the chain has no deltas, the files that it starts from are the answer instead.

    Raises:
        WeightsError: naming version and tensor, where something is damaged or does not fit; or the disk is full.
    """
    if not chain.deltas:
        for _ in _tensors(chain, 0):
            pass  # each one is verified as it passes
        return chain.anchor.shards
    with ShardWriter(_infos(chain.manifest), folder, hashed=False) as shards:
        for _, bits, _ in _tensors(chain, len(chain.deltas)):
            shards.write(bits)
    return tuple(shards.paths)


def write_anchor(chain: Chain, folder: Path) -> tuple[Path, ...]:
    """The published shards of an anchor that was taken by its shortcut, to be kept as an anchor from now on.

    Raises:
        WeightsError: as in `write_full`; or the shards are not the files that the newest manifest names.
    """
    files = write_patch_and_shards(chain, "", folder, folder).shards
    return tuple(folder / file.name for file in files)


def write_patch(chain: Chain, since_digest: str, folder: Path) -> tuple[Path, ...] | None:
    """Patch files from an earlier version to the newest, every tensor verified; see `server.engines.base.Weights`.

    Args:
        chain: leads to the newest version.
        since_digest: of the weights to be patched.
        folder: takes the files.

    Returns:
        The files; none where nothing changed. None where the chain has no version with these weights.

    Raises:
        WeightsError: as in `write_full`.
    """
    since = chain.since(since_digest)
    return None if since is None else _write(chain, since, folder, None).patch


def write_patch_and_shards(
    chain: Chain, since_digest: str, patch_folder: Path, shard_folder: Path
) -> PatchAndShards:
    """Both in one pass: for an anchor that was taken by its shortcut, and is kept as an anchor from now on.

    Raises:
        WeightsError: as in `write_full`; or the shards are not the files that the newest manifest names.
    """
    written = _write(chain, chain.since(since_digest), patch_folder, shard_folder)
    if chain.manifest.is_anchor and written.shards != chain.manifest.files:
        raise WeightsError(
            f"version {chain.manifest.version}: the shards made here are not the published ones"
        )
    return written


def _write(
    chain: Chain, since: int | None, patch_folder: Path | None, shard_folder: Path | None
) -> PatchAndShards:
    patch = shards = None
    with ExitStack() as stack:
        if since is not None and patch_folder is not None:
            patch = stack.enter_context(PatchWriter(patch_folder))
        if shard_folder is not None:
            shards = stack.enter_context(ShardWriter(_infos(chain.manifest), shard_folder))
        for info, bits, changed in _tensors(chain, len(chain.deltas) if since is None else since):
            if patch is not None:
                patch.write(info, changed, bits[changed])
            if shards is not None:
                shards.write(bits)
    return PatchAndShards(
        patch=tuple(patch.files) if patch is not None else None,
        shards=tuple(shards.files) if shards is not None else (),
    )


def _tensors(chain: Chain, since: int) -> Iterator[tuple[TensorInfo, NDArray[Any], Indices]]:
    """Each tensor in canonical order, verified; its bits, and where deltas after the first `since` wrote.

    The bits are good until the next tensor.
    """
    entries = {entry.name: entry for entry in chain.manifest.tensors}
    with ExitStack() as stack:
        anchor, deltas = _open(chain, stack)
        infos = canonical_order(_infos(chain.manifest))
        # One buffer for all of them: memory that is new to the process has to be cleared first.
        buffer = np.empty(max((info.nbytes for info in infos), default=0), np.uint8)
        for info in infos:
            bits, changed = anchor.bits(info.name), []
            for number, (version, files) in enumerate(deltas):
                blob = files.blob(info.name)
                if blob is None:
                    continue
                bits = bits if bits.flags.writeable else _copied(bits, buffer)
                patch = _decode(blob, bits, version, info.name)
                patch.write_into(bits)
                if number >= since:
                    changed.append(patch.indices)
            if sha256_of(bits) != entries[info.name].sha256:
                raise _first_wrong(chain, anchor, deltas, info)
            yield info, bits, _union(changed, info.elements)


def _open(chain: Chain, stack: ExitStack) -> tuple[TensorFiles, list[tuple[int, DeltaFiles]]]:
    manifest = chain.anchor.manifest
    try:
        anchor = stack.enter_context(TensorFiles(chain.anchor.shards))
        if set(anchor.tensors.values()) != _infos(manifest):
            raise WeightsError("its shards hold other tensors than its manifest names")
        names = anchor.tensors.keys()
        deltas = []
        for held in chain.deltas:
            manifest = held.manifest
            paths = (held.folder / file.name for file in _step(manifest).files)
            files = stack.enter_context(DeltaFiles(paths))
            if unknown := sorted(files.names - names):
                raise WeightsError(f"it changes {unknown[0]}, which is no tensor of the anchor")
            deltas.append((manifest.version, files))
    except WeightsError as error:
        raise WeightsError(f"version {manifest.version}: {error}") from None
    return anchor, deltas


def _copied(bits: NDArray[Any], buffer: NDArray[np.uint8]) -> NDArray[Any]:
    copy = buffer[: bits.nbytes].view(bits.dtype)
    np.copyto(copy, bits)
    return copy


def _decode(blob: bytes, bits: NDArray[Any], version: int, name: str) -> Patch:
    try:
        return decode(blob, bits)
    except WeightsError as error:
        raise WeightsError(f"version {version}: tensor {name}: {error}") from None


def _first_wrong(
    chain: Chain, anchor: TensorFiles, deltas: list[tuple[int, DeltaFiles]], info: TensorInfo
) -> WeightsError:
    """Which version went wrong, once the newest is known to be."""
    bits = anchor.bits(info.name).copy()
    if sha256_of(bits) != _entry(chain.anchor.manifest, info.name).sha256:
        return _wrong(chain.anchor.manifest.version, info.name)
    for held, (version, files) in zip(chain.deltas, deltas, strict=True):
        if blob := files.blob(info.name):
            _decode(blob, bits, version, info.name).write_into(bits)
        if sha256_of(bits) != _entry(held.manifest, info.name).sha256:
            return _wrong(version, info.name)
    return WeightsError(
        f"version {chain.manifest.version}: tensor {info.name} was read wrong once and right now: this machine's "
        "disk or memory is not to be trusted"
    )


def _wrong(version: int, name: str) -> WeightsError:
    return WeightsError(f"version {version}: tensor {name} has other bytes than its manifest says")


def _union(changed: list[Indices], elements: int) -> Indices:
    if len(changed) == 1:
        return changed[0]
    kind = index_type(elements)
    return np.unique(np.concatenate(changed)) if changed else np.empty(0, kind)


def _step(manifest: Manifest) -> DeltaEntry:
    if manifest.delta is None:
        raise WeightsError(f"version {manifest.version} has no delta to come to it by")
    return manifest.delta


def _entry(manifest: Manifest, name: str) -> TensorEntry:
    return next(entry for entry in manifest.tensors if entry.name == name)


def _infos(manifest: Manifest) -> set[TensorInfo]:
    return {TensorInfo(name=t.name, dtype=t.dtype, shape=t.shape) for t in manifest.tensors}
