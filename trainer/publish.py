"""A version into the world: durable bytes first, announcement last (DESIGN.md section 6)."""

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from shared.coordination import LEASE_S, Coordinator
from shared.errors import CoordinationError
from shared.fleet import Head
from shared.shards import describe
from shared.store import WeightStore

SHARD_BYTES = 2 << 30
"""Most bytes of one safetensors file, unless a single tensor is larger."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Publishes the versions of one run.

    Args:
        store: takes the bytes.
        store_url: how servers reach it.
        coordinator: takes the announcement.
        token: fencing token of the lease.
        run: name of the run.
        dtype: of the published tensors, for the manifest.
        keep: newest versions that stay in the store.
    """

    store: WeightStore
    store_url: str
    coordinator: Coordinator
    token: str
    run: str
    dtype: str
    keep: int

    async def next_version(self) -> int:
        """One more than every version that was ever announced or stored: no number is used twice."""
        head = await self.coordinator.head()
        stored = await asyncio.to_thread(self.store.versions)
        return max([-1, *stored, *([head.version] if head else [])]) + 1

    async def publish(self, version: int, tensors: Mapping[str, Tensor]) -> Head:
        """Write a full version, then announce it.

        Args:
            version: higher than every version before.
            tensors: by checkpoint name, contiguous, on the CPU, in the published dtype.

        Raises:
            WeightsError: the store refused; nothing is announced.
            CoordinationError: Redis is away, or our lease is gone.
        """
        manifest_digest, weights_digest = await asyncio.to_thread(self._write, version, tensors)
        head = Head(
            version=version,
            manifest_digest=manifest_digest,
            weights_digest=weights_digest,
            store=self.store_url,
        )
        # Only now: a server that hears of a version must find its bytes.
        await self.coordinator.announce(self.token, head)
        return head

    def _write(self, version: int, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
        with tempfile.TemporaryDirectory(prefix="spoke-publish-") as scratch:
            paths = []
            for number, group in enumerate(shards(tensors)):
                path = Path(scratch) / f"weights-{number:05d}.safetensors"
                save_file(group, path)
                paths.append(path)
            manifest = describe(paths, run=self.run, version=version, dtype=self.dtype)
            self.store.publish(manifest, Path(scratch))
        return manifest.digest, manifest.weights_digest

    async def collect(self, newest: int) -> None:
        """Delete versions that are older than the `keep` newest."""
        for version in await asyncio.to_thread(self.store.versions):
            if version <= newest - self.keep:
                await asyncio.to_thread(self.store.delete, version)


@contextlib.asynccontextmanager
async def lease(coordinator: Coordinator) -> AsyncIterator[str]:
    """Hold the run while the block runs; gives the fencing token.

    The lease is renewed in the background. A renewal that fails is not an error here: the next announcement is
    refused instead, which is the moment that matters.

    Raises:
        LeaseError: another trainer holds the run.
    """
    token = await coordinator.acquire_lease(f"{socket.gethostname()}:{os.getpid()}")

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with contextlib.suppress(CoordinationError):
                await coordinator.renew_lease(token)

    renewal = asyncio.create_task(renew())
    try:
        yield token
    finally:
        renewal.cancel()
        with contextlib.suppress(CoordinationError):
            await coordinator.renew_lease(token, release=True)
