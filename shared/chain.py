"""Placeholder until the codec's is merged: an anchor and the deltas that follow it."""

from dataclasses import dataclass
from pathlib import Path

from shared.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A version whose needed files lie in a folder."""

    manifest: Manifest
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """An anchor and deltas, ascending; each delta's base is the one before."""

    anchor: Held
    deltas: tuple[Held, ...]

    @property
    def manifest(self) -> Manifest:
        """The newest version's."""
        return (self.deltas[-1] if self.deltas else self.anchor).manifest
