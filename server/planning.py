"""Which files make a version out of what is held: the fewest bytes. Pure, but for manifests that it asks for."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shared.errors import WeightsError
from shared.manifest import FileEntry, Manifest
from shared.sources import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Files of one version that are to be fetched."""

    manifest: Manifest
    files: tuple[FileEntry, ...]

    @property
    def part(self) -> Part:
        """Which of the version's files these are."""
        return next(part for part, files in parts_of(self.manifest) if files == self.files)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.files)


def parts_of(manifest: Manifest) -> tuple[tuple[Part, tuple[FileEntry, ...]], ...]:
    """The kinds of files that a version has."""
    full = ((Part.FULL, manifest.files),) if manifest.is_anchor else ()
    return full + (() if manifest.delta is None else ((Part.DELTA, manifest.delta.files),))


async def plan(
    head: Manifest,
    *,
    held: Callable[[int, str], bool],
    lowest: int | None,
    manifest_of: Callable[[int, str], Awaitable[Manifest]],
) -> tuple[Step, ...]:
    """Walk back from a version to one that is held, or to an anchor: whatever needs fewer bytes.

    Args:
        head: the version wanted.
        held: whether the version of this number and weights digest can be made of what is here.
        lowest: lowest version that is held; None for none.
        manifest_of: the manifest of a version whose weights have this digest.

    Returns:
        Steps in ascending order; none where the version is held.

    Raises:
        WeightsError: no chain leads to what is held or to an anchor.
    """
    best: tuple[Step, ...] | None = None
    deltas: tuple[Step, ...] = ()
    manifest, spent = head, 0
    while not held(manifest.version, manifest.weights_digest):
        if manifest.is_anchor:
            full = Step(manifest=manifest, files=manifest.files)
            if best is None or full.size + spent < _size(best):
                best = (full, *deltas)
        step = manifest.delta
        # Further back lies nothing that is held, or nothing that is worth its bytes.
        hopeless = lowest is None or (step is not None and step.base_version < lowest)
        if step is None or (best is not None and hopeless):
            return _found(best, manifest)
        deltas = (Step(manifest=manifest, files=step.files), *deltas)
        spent = _size(deltas)
        if best is not None and spent >= _size(best):
            return best
        try:
            manifest = await manifest_of(step.base_version, step.base_digest)
        except WeightsError:
            if best is None:
                raise
            return best
    return deltas


def _size(steps: tuple[Step, ...]) -> int:
    return sum(step.size for step in steps)


def _found(best: tuple[Step, ...] | None, manifest: Manifest) -> tuple[Step, ...]:
    if best is None:
        raise WeightsError(f"version {manifest.version} is no anchor and names no base")
    return best
