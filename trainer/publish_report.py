"""What the publishing of one version cost, in bytes and seconds."""

from dataclasses import dataclass
from typing import Self

from shared.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What one version cost."""

    version: int
    anchor: bool
    full_bytes: int
    """Of the weights themselves."""
    stored_bytes: int
    """Of all files written to the store."""
    delta_bytes: int | None
    """Of the files that a server needs which holds the version before; None without a delta."""
    snapshot_s: float
    """The copy of the weights to host memory: the part that training waits for."""
    encode_s: float
    store_s: float
    """Files and manifest, the wait for a store that was away included."""
    announce_s: float
    """The wait for a Redis that was away included."""
    broadcast_s: float | None
    """From meeting the servers of this cluster to their last answer; None where none took it so."""

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        full_bytes: int,
        snapshot_s: float,
        encode_s: float,
        store_s: float,
        announce_s: float,
        broadcast_s: float | None,
    ) -> Self:
        """Of a version that was announced; see the fields."""
        files = sum(entry.size for entry in manifest.files)
        delta = manifest.delta
        delta_bytes = None if delta is None else sum(entry.size for entry in delta.files)
        return cls(
            version=manifest.version,
            anchor=manifest.is_anchor,
            full_bytes=full_bytes,
            stored_bytes=files + ((delta_bytes or 0) if manifest.is_anchor else 0),
            delta_bytes=delta_bytes,
            snapshot_s=snapshot_s,
            encode_s=encode_s,
            store_s=store_s,
            announce_s=announce_s,
            broadcast_s=broadcast_s,
        )
