"""Versions of made-up bytes, for what carries them and does not look inside."""

import random
from pathlib import Path

from shared.digests import sha256
from shared.fleet import Head
from shared.fsspec_store import FsspecStore
from shared.manifest import DeltaEntry, Encoding, FileEntry, Manifest, TensorEntry

RUN = "run"


def entry(folder: Path, name: str, data: bytes) -> FileEntry:
    """A file that is written, and its entry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return FileEntry(name=name, size=len(data), sha256=sha256(data))


def noise(size: int, seed: object) -> bytes:
    """Bytes that are the same for the same seed."""
    return random.Random(str(seed)).randbytes(size)


class Versions:
    """A run in a store on disk; anchors at 0 and wherever asked.

    Args:
        folder: takes the store and what is published.
        shards: bytes of each shard of an anchor.
        delta: bytes of a delta.
        branch: tells runs of the same numbers and other bytes apart.
        run: its name; one of its own where Redis is shared with other tests.
        url: of a store elsewhere than in the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shards: tuple[int, ...] = (300_000, 200_000),
        delta: int = 20_000,
        branch: str = "",
        run: str = RUN,
        url: str = "",
    ) -> None:
        self.root = folder / "store"
        self.made = folder / "made"
        self.store = FsspecStore(url or f"file://{self.root}", run)
        self.run = run
        self._shards, self._delta, self._branch = shards, delta, branch
        self.manifests: list[Manifest] = []

    def folder(self, version: int) -> Path:
        """Of a version in the store."""
        return self.root / self.run / f"v{version:06d}"

    def publish(self, *, anchor: bool = False) -> Head:
        """The next version."""
        version = len(self.manifests)
        folder = self.made / f"{version}"
        before = self.manifests[-1] if self.manifests else None
        anchor = anchor or before is None
        seed = f"{self._branch}{version}"
        tensor = TensorEntry(
            name="w", dtype="F32", shape=(1,), sha256=sha256(f"weights {seed}".encode())
        )
        full = tuple(
            entry(folder, f"weights-{n}.safetensors", noise(size, f"{seed} {n}"))
            for n, size in enumerate(self._shards if anchor else ())
        )
        step = None
        if before is not None:
            changed = entry(folder, "delta-0.zst", noise(self._delta, f"{seed} delta"))
            step = DeltaEntry(
                base_version=before.version, base_digest=before.weights_digest, files=(changed,)
            )
        manifest = Manifest(
            run=self.run,
            version=version,
            dtype="float32",
            tensors=(tensor,),
            encoding=Encoding.FULL if anchor else Encoding.DELTA,
            files=full if step is None or anchor else step.files,
            base_version=None if anchor or step is None else step.base_version,
            base_digest="" if anchor or step is None else step.base_digest,
            shortcut=step if anchor else None,
        ).seal()
        self.store.publish(manifest, folder)
        self.manifests.append(manifest)
        return self.head()

    def head(self, version: int = -1, store: str = "") -> Head:
        """A version, as it is announced."""
        manifest = self.manifests[version]
        return Head(
            version=manifest.version,
            manifest_digest=manifest.digest,
            weights_digest=manifest.weights_digest,
            store=store or self.store.given,
        )
