"""What safetensors files hold, for tests: their tensors' hashes, a manifest of them, and whether they fit one."""

from collections.abc import Iterable
from pathlib import Path

from shared.digests import file_sha256
from shared.errors import WeightsError
from shared.manifest import FileEntry, Manifest, TensorEntry
from shared.tensor_files import TensorFiles, sha256_of


def tensor_entries(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, by name, hashed in place.

    Raises:
        WeightsError: not a whole safetensors file.
    """
    with TensorFiles([path]) as files:
        return [
            TensorEntry(
                name=name, dtype=info.dtype, shape=info.shape, sha256=sha256_of(files.bits(name))
            )
            for name, info in sorted(files.tensors.items())
        ]


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
