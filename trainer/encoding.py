"""A snapshot of the weights as a version: files in a folder, and the manifest that names them.

Against the version before, a delta; where that is not worth it, or none is there to start from, full shards: an
anchor. Now and then both: an anchor that has its delta beside it, as `shortcut`, so that servers that follow need
no second full copy. Comparing, hashing and compressing let go of the interpreter's lock: this runs in a thread,
while the trainer goes on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.delta import encode
from shared.delta_file import write_delta
from shared.manifest import DeltaEntry, Encoding, FileEntry, Manifest, TensorEntry
from shared.shards import canonical_order, write_shards
from shared.tensor_files import TensorInfo, sha256_of

MOST_CHANGED = 0.25
"""Share of elements above which no delta is tried by default: smaller, but on a quick line not there sooner."""
MOST_DELTA = 0.25
"""Largest delta, as a share of the full bytes."""
MOST_CHAIN = 0.5
"""Largest sum of deltas since the last anchor, as a share of the full bytes: a newcomer fetches them all."""
_SAMPLE, _SAMPLES = 4096, 16
"""A tensor's change is guessed from so many runs of so many elements."""
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Types as safetensors writes them."""
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedVersion:
    """A version in files, and what the next one is encoded against."""

    manifest: Manifest
    """Sealed."""
    tensors: Mapping[str, Tensor]
    """Its weights; not to be changed any more."""
    deltas: int
    """Versions since the last anchor: 0 for an anchor."""
    delta_bytes: int
    """Of their files."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All that the folder must hold: shards, delta files, or both."""
        shortcut = self.manifest.shortcut
        return (*self.manifest.files, *(shortcut.files if shortcut else ()))


class _TooLargeError(Exception):
    """The delta grew beyond `MOST_DELTA`."""


def encode_version(
    tensors: Mapping[str, Tensor],
    *,
    run: str,
    version: int,
    dtype: str,
    folder: Path,
    previous: EncodedVersion | None = None,
    anchor_due: bool = False,
    most_changed: float = MOST_CHANGED,
) -> EncodedVersion:
    """Write the files of a version.

    Args:
        tensors: by checkpoint name, contiguous, on the CPU, in the published dtype.
        run: name of the run.
        version: higher than the version before.
        dtype: of the published tensors, for the manifest.
        folder: takes the files; of this version alone.
        previous: the version before, as published; None where there is none, or its bytes are not at hand.
        anchor_due: write full shards even where a delta would do. Without it they are written when there is
            nothing to start from, when names, shapes or types changed, when the delta would be large
            (`most_changed`, `MOST_DELTA`), and when all deltas since the last anchor are (`MOST_CHAIN`).
        most_changed: share of elements above which no delta is tried.

    Raises:
        WeightsError: the folder cannot be written; the disk is full, say.
    """
    infos = _infos(tensors)
    full_bytes = sum(info.nbytes for info in infos)
    step: DeltaEntry | None = None
    if previous is not None and _worth_trying(previous.tensors, tensors, most_changed):
        step, entries = _write_step(previous, tensors, infos, folder, int(MOST_DELTA * full_bytes))
    if step is None or previous is None:
        entries = tensor_entries(tensors)
        deltas = chain_bytes = 0
    else:
        deltas = previous.deltas + 1
        chain_bytes = previous.delta_bytes + sum(file.size for file in step.files)
    common = {"run": run, "version": version, "dtype": dtype, "tensors": entries}
    if step is not None and not anchor_due and chain_bytes <= MOST_CHAIN * full_bytes:
        manifest = Manifest(**common, encoding=Encoding.DELTA, **dict(step))
    else:
        shards = write_shards(infos, lambda name: bits_of(tensors[name]), folder)
        manifest = Manifest(**common, files=shards, shortcut=step)
        deltas = chain_bytes = 0
    return EncodedVersion(
        manifest=manifest.seal(), tensors=tensors, deltas=deltas, delta_bytes=chain_bytes
    )


def tensor_info(name: str, tensor: Tensor) -> TensorInfo:
    """What a manifest says of a tensor, save its hash."""
    return TensorInfo(name=name, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape))


def tensor_entries(tensors: Mapping[str, Tensor]) -> tuple[TensorEntry, ...]:
    """What a manifest says of the tensors, in its order; hashes each."""
    return tuple(_entry(info, tensors) for info in _infos(tensors))


def _infos(tensors: Mapping[str, Tensor]) -> list[TensorInfo]:
    return canonical_order(tensor_info(name, tensor) for name, tensor in tensors.items())


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """[n] the tensor's own memory as unsigned integers."""
    width = tensor.element_size()
    signed: NDArray[Any] = tensor.detach().reshape(-1).view(_SIGNED[width]).numpy()
    return signed.view(f"u{width}")


def _entry(info: TensorInfo, tensors: Mapping[str, Tensor]) -> TensorEntry:
    digest = sha256_of(bits_of(tensors[info.name]))
    return TensorEntry(name=info.name, dtype=info.dtype, shape=info.shape, sha256=digest)


def _worth_trying(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], most_changed: float
) -> bool:
    """Are these the same tensors, and did few elements change, by a sample of each?"""
    if before.keys() != after.keys() or any(
        (tensor.shape, tensor.dtype) != (after[name].shape, after[name].dtype)
        for name, tensor in before.items()
    ):
        return False
    changed = sum(_changed(bits_of(before[name]), bits_of(after[name])) for name in after)
    return changed <= most_changed * sum(tensor.numel() for tensor in after.values())


def _changed(before: NDArray[Any], after: NDArray[Any]) -> float:
    """How many elements changed, about."""
    starts = range(0, before.size, max(_SAMPLE, -(-before.size // _SAMPLES)))
    parts = [slice(start, start + _SAMPLE) for start in starts]
    seen = sum(before[part].size for part in parts)
    changed = sum(int(np.count_nonzero(before[part] != after[part])) for part in parts)
    return changed * before.size / seen if seen else 0.0


def _write_step(
    previous: EncodedVersion,
    tensors: Mapping[str, Tensor],
    infos: list[TensorInfo],
    folder: Path,
    most_bytes: int,
) -> tuple[DeltaEntry | None, tuple[TensorEntry, ...]]:
    """The delta's files and the hashes of the new tensors; no delta where it is too large."""
    entries: dict[str, TensorEntry] = {entry.name: entry for entry in previous.manifest.tensors}

    def blobs() -> Iterator[tuple[str, bytes]]:
        written = 0
        for info in infos:
            blob = encode(bits_of(previous.tensors[info.name]), bits_of(tensors[info.name]))
            if blob is None:
                continue  # its hash is the one that it had
            written += len(blob)
            if written > most_bytes:
                raise _TooLargeError
            entries[info.name] = _entry(info, tensors)
            yield info.name, blob

    try:
        files = write_delta(blobs(), folder)
    except _TooLargeError:
        for path in folder.glob("delta-*"):
            path.unlink()
        return None, ()
    step = DeltaEntry(
        base_version=previous.manifest.version,
        base_digest=previous.manifest.weights_digest,
        files=files,
    )
    return step, tuple(entries[info.name] for info in infos)
