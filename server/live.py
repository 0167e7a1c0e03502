"""`GET /weights/live`: which bytes the engine really samples with, hashed where they stand in its memory."""

import asyncio
from dataclasses import dataclass, field

from pydantic import BaseModel, Field

from server.engines.base import Engine
from server.status import Status
from shared.digests import weights_digest
from shared.errors import BusyError
from shared.manifest import Manifest

LIVE_S = 600.0
"""Bound of hashing all weights, and of waiting for one's turn, seconds."""
TRIES = 3
"""How often it is begun when new weights come meanwhile."""


class LiveWeights(BaseModel):
    """The weights in the engine's memory, hashed at this request."""

    version: int = Field(description="weight version that is held")
    digest: str = Field(
        description="of that version, as its manifest says; empty for the checkpoint it started from"
    )
    live_digest: str | None = Field(
        description="the same digest, of the bytes in memory: equal to `digest` where they are right; null where "
        "nothing was taken yet, so that there is nothing to compare with"
    )
    dtype: str = Field(description="the published format, in which the bytes are hashed")
    rounded: str | None = Field(
        description="why the two digests cannot agree: the engine keeps fewer bits than are published; null where "
        "it keeps all"
    )
    tensors: dict[str, str] = Field(
        description="SHA-256 of each tensor's bytes, by checkpoint name"
    )


def rounded(published: str, kept: str) -> str | None:
    """What the engine's format costs; None where it keeps every published bit.

    >>> (rounded("float32", "bfloat16") or "").partition(":")[0]
    'float32 is published and this engine keeps bfloat16'
    >>> rounded("bfloat16", "float32") is None
    True
    """
    if kept in (published, "float32"):
        return None
    return (
        f"{published} is published and this engine keeps {kept}: its weights are rounded, and their hashes are "
        f"others; give the server --dtype {published}, or publish what it keeps (fleet.dtype)"
    )


@dataclass(slots=True)
class Live:
    """Hashes an engine's weights, for one caller at a time.

    Args:
        engine: has them.
        status: says which version they are to be.
    """

    engine: Engine
    status: Status
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def weights(self) -> LiveWeights:
        """All of them, hashed now: nothing is remembered from before.

        Raises:
            BusyError: new weights kept coming, or it took too long.
            EngineError: the engine failed, or cannot tell.
        """
        try:
            async with asyncio.timeout(LIVE_S), self._turn:
                for _ in range(TRIES):
                    found = await self._hashed()
                    if found is not None:
                        return found
        except TimeoutError:
            raise BusyError(f"the weights were not hashed in {LIVE_S:g} s") from None
        raise BusyError("new weights came while the weights were hashed; ask again")

    async def _hashed(self) -> LiveWeights | None:
        """None where new weights came meanwhile."""
        before, manifest = self._held(), self.status.manifest
        dtype = self.engine.info.dtype if manifest is None else manifest.dtype
        tensors = await self.engine.live_digests(dtype)
        if self._held() != before or before[2] != before[0]:
            return None
        version, digest, _ = before
        live = None if manifest is None else _digest(manifest, tensors)
        return LiveWeights(
            version=version,
            digest=digest,
            live_digest=live,
            dtype=dtype,
            rounded=rounded(dtype, self.engine.info.dtype),
            tensors=tensors,
        )

    def _held(self) -> tuple[int, str, int]:
        standing = self.status.standing
        return standing.version, standing.digest, self.engine.version


def _digest(manifest: Manifest, tensors: dict[str, str]) -> str:
    """Digest of the live tensors; one that is missing or unknown makes it another than the manifest's."""
    shapes = {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}
    missing: tuple[str, tuple[int, ...]] = ("", ())
    names = shapes.keys() | tensors.keys()
    return weights_digest(
        (name, *shapes.get(name, missing), tensors.get(name, "")) for name in names
    )
