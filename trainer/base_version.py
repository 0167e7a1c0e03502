"""What `spoke push` builds upon: the run's newest version.

A checkpoint that is said to be its weights (`--base`) is believed nothing: every tensor's hash must be the
manifest's. So what is pushed against it is as exact as what a trainer publishes against a version of its own.
"""

from collections.abc import Mapping

from torch import Tensor

from shared.errors import ConfigError, WeightsError
from shared.fleet import Head
from shared.manifest import Manifest
from shared.store import WeightReader
from trainer.encoding import EncodedVersion, tensor_entries

_OTHERWISE = "or leave --base out, which pushes all weights"


def as_published(
    head: Head | None, tensors: Mapping[str, Tensor], dtype: str, store: WeightReader
) -> EncodedVersion:
    """The run's newest version, as its publisher knew it.

    Args:
        head: of the run.
        tensors: of the checkpoint, by name, in `dtype`, contiguous, on the CPU.
        dtype: of what is about to be pushed.
        store: holds the run's versions.

    Raises:
        ConfigError: there is no such version, it cannot be built upon, or the tensors are not its.
    """
    if head is None:
        raise ConfigError("--base: the run has no version yet; leave --base out")
    number = f"version {head.version}, the run's newest"
    try:
        manifest = store.manifest(head.version)
        deltas, delta_bytes = _since_anchor(manifest, store)
    except WeightsError as error:
        raise ConfigError(f"--base: {error}; leave --base out, which pushes all weights") from None
    if manifest.digest != head.manifest_digest:
        raise ConfigError(
            f"--base: {store.url} has another version {head.version} than the one that was announced; give "
            f"--store as it was for that one, {_OTHERWISE}"
        )
    if manifest.dtype != dtype:
        raise ConfigError(
            f"--base: {number}, is in {manifest.dtype}, this one in {dtype}; give --dtype {manifest.dtype}, "
            f"{_OTHERWISE}"
        )
    if set(tensor_entries(tensors)) != set(manifest.tensors):
        raise ConfigError(
            f"--base: its weights are not those of {number}; give the checkpoint that was pushed last, "
            f"{_OTHERWISE}"
        )
    return EncodedVersion(
        manifest=manifest, tensors=tensors, deltas=deltas, delta_bytes=delta_bytes
    )


def check_fits(head: Head | None, tensors: Mapping[str, Tensor], store: WeightReader) -> None:
    """Has a checkpoint the tensors that the run's servers hold? Passed over where that cannot be known.

    Args:
        head: of the run.
        tensors: of the checkpoint, by name.
        store: holds the run's versions.

    Raises:
        ConfigError: it has others, or of other shapes.
    """
    if head is None:
        return
    try:
        manifest = store.manifest(head.version)
    except WeightsError:  # a store of its own: nothing to compare with
        return
    if manifest.digest != head.manifest_digest:  # likewise
        return
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {entry.name: entry.shape for entry in manifest.tensors}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"tensor {name} has shape {ours.get(name, 'none')} in the checkpoint, and "
                f"{theirs.get(name, 'none')} in version {head.version}, the run's newest: its servers could "
                "not take it; give another --run, or --force where servers of this shape are to come"
            )


def _since_anchor(manifest: Manifest, store: WeightReader) -> tuple[int, int]:
    """How many deltas lead from the last anchor to a version, and their bytes.

    Raises:
        WeightsError: a manifest is missing or damaged.
    """
    deltas = delta_bytes = 0
    while not manifest.is_anchor and manifest.delta is not None:
        deltas += 1
        delta_bytes += sum(file.size for file in manifest.delta.files)
        manifest = store.manifest(manifest.delta.base_version)
    return deltas, delta_bytes
