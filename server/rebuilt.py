"""The full weights of one version that this server wrote for itself, so that the next versions start there.

A chain grows by a delta with every version, up to the next anchor, and each new version would decode all of it
again. Nobody else sees these files, no manifest names them, and they are not kept over a restart. Whatever is
built upon them is compared with its manifest tensor by tensor, so damage is found, and then the anchor is there.
"""

import shutil
import threading
from pathlib import Path

from shared.chain import Chain, Held, write_full

DELTAS = 2
"""A chain of so many is worth the writing of the full weights (`tests/benchmarks/delta.py`)."""
ROOM = 2
"""So many times the full weights must be free on the disk: what is fetched comes first."""


class Rebuilt:
    """Full weights of at most one version, in a folder of their own.

    Args:
        folder: made when it is needed; what an earlier process left in it is deleted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base: Held | None = None
        self._changing = threading.Lock()
        shutil.rmtree(folder, ignore_errors=True)

    def shortened(self, chain: Chain) -> Chain:
        """The same chain from these weights on, where it comes by them."""
        base = self._base
        for number, held in enumerate(chain.deltas, 1):
            if base is not None and held.manifest.digest == base.manifest.digest:
                return Chain(anchor=base, deltas=chain.deltas[number:])
        return chain

    def write(self, chain: Chain) -> None:
        """Write the full weights of a chain's newest version, where it is long enough and the disk has room.

        Raises:
            WeightsError: what the chain is made of is damaged, or the disk is full; nothing is kept of it.
        """
        if len(chain.deltas) < DELTAS or not self._has_room(chain):
            return
        folder = self._folder / chain.manifest.digest[:16]
        shards: tuple[Path, ...] = ()
        try:
            shards = write_full(chain, folder)
        finally:
            if not shards:
                shutil.rmtree(folder, ignore_errors=True)
        self._replace(Held(manifest=chain.manifest, folder=folder, rebuilt=shards))

    def _has_room(self, chain: Chain) -> bool:
        size = sum(path.stat().st_size for path in chain.anchor.shards)
        self._folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._folder).free >= ROOM * size

    def keep(self, chain: Chain) -> None:
        """Delete the weights where a whole chain does not come by them."""
        if self.shortened(chain) is chain:
            self.forget()

    def forget(self) -> None:
        """Delete the weights."""
        self._replace(None)

    def _replace(self, base: Held | None) -> None:
        with self._changing:
            before, self._base = self._base, base
        if before is not None and before != base:
            shutil.rmtree(before.folder, ignore_errors=True)
