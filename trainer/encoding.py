"""Placeholder until the codec's is merged: every version is an anchor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from shared.manifest import Manifest
from shared.shards import describe

SHARD_BYTES = 2 << 30
"""Most bytes of one safetensors file, unless a single tensor is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The version before, as it was published."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]


def shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups of at most `SHARD_BYTES`, by name."""
    group: dict[str, Tensor] = {}
    size = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if group and size + tensor.nbytes > SHARD_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def encode_version(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    run: str,
    version: int,
    dtype: str,
    base: Base | None,
    anchor: bool,
) -> Manifest:
    """Write a version's files; returns its sealed manifest."""
    del base, anchor
    paths = []
    for number, group in enumerate(shards(tensors)):
        path = folder / f"weights-{number:05d}.safetensors"
        save_file(group, path)
        paths.append(path)
    return describe(paths, run=run, version=version, dtype=dtype)
