"""Made-up versions of one model: an anchor and deltas on this disk, as a trainer would have written them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.chain import Chain, Held
from shared.delta import encode
from shared.delta_file import write_delta
from shared.digests import sha256
from shared.manifest import DeltaEntry, Encoding, Manifest, TensorEntry
from shared.shards import write_shards
from shared.tensor_files import TensorInfo

Bits = NDArray[Any]
INFOS = {
    info.name: info
    for info in (
        TensorInfo(name="model.embed.weight", dtype="BF16", shape=(50, 8)),
        TensorInfo(name="model.layer.weight", dtype="BF16", shape=(7, 3)),
        TensorInfo(name="model.norm.weight", dtype="F32", shape=(5,)),
        TensorInfo(name="model.scale", dtype="F32", shape=()),
        TensorInfo(name="model.empty", dtype="BF16", shape=(0, 4)),
        TensorInfo(name="model.steps", dtype="I64", shape=(3,)),
    )
}
KINDS = {"BF16": np.uint16, "F32": np.uint32, "I64": np.uint64}


def weights(seed: int) -> dict[str, Bits]:
    """Anything at all."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, np.iinfo(KINDS[t.dtype]).max, t.elements, KINDS[t.dtype])
        for name, t in INFOS.items()
    }


def moved(base: Mapping[str, Bits], seed: int) -> dict[str, Bits]:
    """Some elements of some tensors one further."""
    rng = np.random.default_rng(seed)
    new = {name: bits.copy() for name, bits in base.items()}
    for name in ("model.embed.weight", "model.layer.weight", "model.scale"):
        chosen = rng.random(new[name].size) < 0.2
        new[name][chosen] += new[name].dtype.type(1)
    return new


def entries(values: Mapping[str, Bits]) -> tuple[TensorEntry, ...]:
    """What a manifest says of the tensors."""
    return tuple(
        TensorEntry(
            name=t.name, dtype=t.dtype, shape=t.shape, sha256=sha256(values[name].tobytes())
        )
        for name, t in INFOS.items()
    )


def anchor(version: int, values: Mapping[str, Bits], folder: Path) -> Held:
    """The version as full shards."""
    manifest = Manifest(
        run="run",
        version=version,
        dtype="bfloat16",
        tensors=entries(values),
        files=write_shards(INFOS.values(), values.__getitem__, folder),
    )
    return Held(manifest=manifest.seal(), folder=folder)


def step(
    base: Manifest, before: Mapping[str, Bits], after: Mapping[str, Bits], folder: Path
) -> DeltaEntry:
    """The delta files from one version to another."""
    blobs = ((name, encode(before[name], after[name])) for name in before)
    return DeltaEntry(
        base_version=base.version,
        base_digest=base.weights_digest,
        files=write_delta(((name, blob) for name, blob in blobs if blob is not None), folder),
    )


def delta(
    base: Manifest, before: Mapping[str, Bits], after: Mapping[str, Bits], folder: Path
) -> Held:
    """The version after `base`, as a delta."""
    entry = step(base, before, after, folder)
    manifest = Manifest(
        run="run",
        version=base.version + 1,
        base_version=base.version,
        base_digest=entry.base_digest,
        encoding=Encoding.DELTA,
        dtype="bfloat16",
        tensors=entries(after),
        files=entry.files,
    )
    return Held(manifest=manifest.seal(), folder=folder)


def chain(folder: Path, deltas: int) -> tuple[Chain, Sequence[dict[str, Bits]]]:
    """An anchor of version 3 and so many deltas after it; with the weights of every version."""
    values = [weights(0)]
    held = [anchor(3, values[0], folder / "v3")]
    for number in range(deltas):
        values.append(moved(values[-1], seed=number))
        held.append(delta(held[-1].manifest, *values[-2:], folder / f"v{4 + number}"))
    return Chain(anchor=held[0], deltas=tuple(held[1:])), values
