"""A run whose weights change a little at each version, on a real store and a real Redis; and an engine of it.

The engine is a fake: it keeps arrays instead of a model, and fails when it is told to.
"""

import asyncio
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from server.engines.base import ApplyReport, Weights
from shared.coordination import RedisCoordinator
from shared.delta import encode
from shared.delta_file import write_delta
from shared.digests import sha256
from shared.errors import WeightsError
from shared.fleet import Head, ServerRecord
from shared.fsspec_store import FsspecStore
from shared.manifest import DeltaEntry, Encoding, Manifest, TensorEntry
from shared.shards import write_shards
from shared.tensor_files import TensorInfo

TIMEOUT = 20.0


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    return {
        name: sha256(memoryview(tensor.contiguous().view(torch.uint8).numpy()))
        for name, tensor in tensors.items()
    }


def bits(tensor: Tensor) -> NDArray[Any]:
    """[N] float32 as uint32."""
    found: NDArray[Any] = tensor.contiguous().view(-1).numpy().view(np.uint32)
    return found


class Run:
    """The trainer's side: versions into a store, heads into Redis.

    Args:
        folder: of the store.
        redis_url: of Redis.
        tensors: version 0.
        store: elsewhere than in the folder.
    """

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        tensors: dict[str, Tensor] | None = None,
        store: str = "",
    ):
        self.name = f"run-{uuid.uuid4().hex[:8]}"
        self.redis_url = redis_url
        self.root = folder / "store"
        self.store = FsspecStore(store or f"file://{self.root}", self.name)
        self.coordinator = RedisCoordinator(redis_url, self.name)
        random = torch.Generator().manual_seed(0)
        self.tensors = tensors or {
            "a": torch.randn(64, 128, generator=random),
            "b": torch.randn(300, generator=random),
        }
        self.digests: dict[int, dict[str, str]] = {}
        self._base: Manifest | None = None
        self._scratch = folder / "scratch"
        self.version = -1

    def folder(self, version: int) -> Path:
        """Of a version in the store."""
        return self.root / self.name / f"v{version:06d}"

    async def publish(self, count: int = 1, **how: Any) -> Head:
        """Store the next versions and announce the last of them."""
        head = await self.make(count, **how)
        await self.announce(head)
        return head

    async def make(
        self, count: int = 1, *, anchor: bool = False, max_staleness: int | None = 1
    ) -> Head:
        """Store the next versions, a few elements changed in each; nobody hears of them yet."""
        for _ in range(count):
            self.version += 1
            head = await asyncio.to_thread(self._store, anchor, max_staleness)
        return head

    async def announce(self, head: Head) -> None:
        """Make it the run's head."""
        # Taken anew each time: nobody renews it, and Redis may have restarted empty.
        token = await self.coordinator.acquire_lease("test")
        await self.coordinator.announce(token, head)

    def _store(self, anchor: bool, max_staleness: int | None) -> Head:
        random = torch.Generator().manual_seed(self.version)
        tensors = {}
        for name, tensor in self.tensors.items():
            places = torch.randint(tensor.numel(), (5,), generator=random)
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[places] += 0.5
        self._scratch.mkdir()
        manifest = self._written(tensors, anchor)
        self.store.publish(manifest, self._scratch)
        shutil.rmtree(self._scratch)
        self.tensors, self._base = tensors, manifest
        self.digests[self.version] = digests(tensors)
        return Head(
            version=self.version, manifest_digest=manifest.digest, weights_digest=manifest.weights_digest,
            store=self.store.url, max_staleness=max_staleness,
        )  # fmt: skip

    def _written(self, tensors: dict[str, Tensor], anchor: bool) -> Manifest:
        """An anchor, with its shortcut where there is a version before it; or a delta."""
        infos = [TensorInfo(name=n, dtype="F32", shape=tuple(t.shape)) for n, t in tensors.items()]
        base, shards, step = self._base, None, None
        if base is not None:
            blobs = (
                (name, encode(bits(self.tensors[name]), bits(tensors[name]))) for name in tensors
            )
            step = DeltaEntry(
                base_version=base.version, base_digest=base.weights_digest,
                files=write_delta(((n, b) for n, b in blobs if b is not None), self._scratch),
            )  # fmt: skip
        if base is None or anchor:
            shards = write_shards(infos, lambda name: bits(tensors[name]), self._scratch)
        sums = digests(tensors)
        about: dict[str, Any] = {
            "run": self.name, "version": self.version, "dtype": "float32",
            "tensors": [
                TensorEntry(name=t.name, dtype=t.dtype, shape=t.shape, sha256=sums[t.name]) for t in infos
            ],
        }  # fmt: skip
        if shards is not None:
            return Manifest(**about, files=shards, shortcut=step).seal()
        assert step is not None
        return Manifest(
            **about, files=step.files, encoding=Encoding.DELTA,
            base_version=step.base_version, base_digest=step.base_digest,
        ).seal()  # fmt: skip

    async def record(self, suits: Callable[[ServerRecord], bool]) -> ServerRecord:
        """The one server's record, once it suits."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                for record in await self.coordinator.servers():
                    if suits(record):
                        return record
                await asyncio.sleep(0.01)


class FakeEngine:
    """Arrays in place of a model."""

    def __init__(self) -> None:
        self.version = 0
        self.digest = ""
        self.open_sequences = 0
        self.info = SimpleNamespace(model="m", engine="fake", dtype="float32")
        self.tensors: dict[str, Tensor] = {}
        self.loads: list[Weights] = []
        """What it was asked to load, whether or not it did."""
        self.failures: list[Exception] = []
        """Raised by the next loads, before anything is changed."""

    async def load_weights(self, weights: Weights) -> ApplyReport:
        self.loads.append(weights)
        if self.failures:
            raise self.failures.pop(0)
        tensors: dict[str, Tensor] = {}
        for file in weights.files:
            tensors |= load_file(file)
        if weights.base_digest is None:
            self.tensors = tensors
        else:
            if weights.base_digest != self.digest:
                raise WeightsError("a patch for other weights")
            for name in [n.removesuffix(".indices") for n in tensors if n.endswith(".indices")]:
                flat = self.tensors[name].view(-1)
                flat[tensors[f"{name}.indices"].long()] = tensors[f"{name}.values"]
        self.version, self.digest = weights.version, weights.digest
        return ApplyReport(stage_s=0.004, pause_s=0.002, apply_s=0.001)

    async def live_digests(self, dtype: str) -> dict[str, str]:
        return digests(self.tensors)


def service_of(engine: Any) -> Any:
    """As much of a service as a follower needs."""
    return SimpleNamespace(engine=engine)
