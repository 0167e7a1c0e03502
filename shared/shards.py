"""safetensors files as bytes: which tensors they hold and what each one's bytes hash to, without torch."""

import hashlib
import json
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.digests import file_sha256
from shared.errors import WeightsError
from shared.manifest import FileEntry, Manifest, TensorEntry


def tensor_entries(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, hashed in place.

    Raises:
        WeightsError: not a whole safetensors file.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            (length,) = struct.unpack_from("<Q", data)
            if 8 + length > len(data):
                raise ValueError("its header is cut short")
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            return [
                _entry(name, fields, data, 8 + length) for name, fields in sorted(header.items())
            ]
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise WeightsError(f"{path.name} is not a whole safetensors file: {error}") from None


def _entry(name: str, fields: dict[str, Any], data: mmap.mmap, offset: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    if not 0 <= begin <= end <= len(data) - offset:
        raise ValueError(f"tensor {name} lies outside the file")
    # Hashed through a view: a shard may be larger than the memory to spare.
    with memoryview(data) as view:
        digest = hashlib.sha256(view[offset + begin : offset + end]).hexdigest()
    return TensorEntry.model_validate(
        {"name": name, "dtype": fields["dtype"], "shape": fields["shape"], "sha256": digest}
    )


def describe(paths: Iterable[Path], *, run: str, version: int, dtype: str) -> Manifest:
    """The sealed manifest of a full version whose shards are `paths`, all in one folder."""
    shards = list(paths)
    return Manifest(
        run=run,
        version=version,
        dtype=dtype,
        tensors=tuple(entry for path in shards for entry in tensor_entries(path)),
        files=tuple(
            FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))
            for path in shards
        ),
    ).seal()


def verify_tensors(paths: Iterable[Path], manifest: Manifest) -> None:
    """Check that the files hold exactly the manifest's tensors, byte for byte.

    Raises:
        WeightsError: naming the first tensor that is missing, unknown or different.
    """
    found = {entry.name: entry for path in paths for entry in tensor_entries(path)}
    wanted = {entry.name: entry for entry in manifest.tensors}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            problem = (
                "missing" if name not in found else "unknown" if name not in wanted else "different"
            )
            raise WeightsError(f"version {manifest.version}: tensor {name} is {problem}")
