"""Which old versions nobody needs any more."""

import threading
from collections.abc import Collection, Mapping

from shared.coordination import Coordinator
from shared.errors import WeightsError
from shared.manifest import Manifest
from shared.store import WeightStore
from trainer.storing import asked


def superseded(
    versions: Mapping[int, bool], held: Collection[int], keep: int, needed: Collection[int] = ()
) -> list[int]:
    """The stored versions that can go.

    What stays: every version from the newest anchor at or below the lowest one that a live server holds, so that
    it and its peers catch up by deltas, or is fetching; and, each with the anchor that it builds upon, the `keep`
    newest. A server that holds something older than the anchor before the newest is not waited for: it comes back
    by the newest. What is fetched stays for one anchor more: a server that is stuck must not fill the disk.

    Args:
        versions: stored versions; whether each is an anchor.
        held: versions of live servers.
        keep: newest versions that stay, at least 1.
        needed: lowest versions that live servers are fetching.

    Returns:
        Ascending. Never the newest anchor, nor anything after it.

    Anchors at 0, 10 and 20; a server that holds 19 needs 20 (by its shortcut) and what follows, and what makes 19
    for others; one that holds 3 comes back by 20:

    >>> versions = {v: v % 10 == 0 for v in range(23)}
    >>> superseded(versions, held=[22, 19, 3], keep=3) == list(range(10))
    True
    >>> superseded(versions, held=[22, 21], keep=2) == list(range(20))
    True

    A joiner still fetches what the anchor at 0 begins:

    >>> superseded(versions, held=[22], keep=3, needed=[0])
    []
    """
    anchors = sorted(v for v, is_anchor in versions.items() if is_anchor)
    if not anchors:
        return []
    oldest_waited_for, oldest_fetched = anchors[-2:][0], anchors[-3:][0]
    lowest = min(
        [
            anchors[-1],
            *sorted(versions)[-keep:],
            *(v for v in held if v >= oldest_waited_for),
            *(v for v in needed if v >= oldest_fetched),
        ]
    )
    first = max((v for v in anchors if v <= lowest), default=min(versions))
    return sorted(v for v in versions if v < first)


class Collector:
    """Deletes from a run's store what nobody needs any more.

    Args:
        store: of the run.
        coordinator: knows the live servers.
        keep: newest versions that stay.
        wait_s: longest that one collection may take.
    """

    def __init__(
        self, *, store: WeightStore, coordinator: Coordinator, keep: int, wait_s: float = 300.0
    ) -> None:
        self._store, self._coordinator, self._keep = store, coordinator, keep
        self._wait_s = wait_s
        self._turn = threading.Lock()
        self._anchors: dict[int, bool] = {}

    def note(self, manifest: Manifest) -> None:
        """A version that was published just now: the store need not be asked for it."""
        self._anchors[manifest.version] = manifest.is_anchor

    async def collect(self, newest: int) -> None:
        """Delete the `superseded` versions, and what publishes that died left behind.

        Args:
            newest: the newest version that is announced; nothing after it is touched.

        Raises:
            CoordinationError: Redis is away.
            WeightsError: the store is away, or hangs.
        """
        records = await self._coordinator.servers()
        held = [record.version for record in records if record.digest]
        needed = [record.needs for record in records if record.needs is not None]
        place = f"weight store {self._store.url}"
        await asked(place, self._wait_s, self._alone, newest, held, needed)

    def _alone(self, newest: int, held: list[int], needed: list[int]) -> None:
        if not self._turn.acquire(blocking=False):
            raise WeightsError("the collection before, which had its time, still hangs")
        try:
            self._collect(newest, held, needed)
        finally:
            self._turn.release()

    def _collect(self, newest: int, held: list[int], needed: list[int]) -> None:
        numbers = [version for version in self._store.numbers() if version <= newest]
        for gone in [v for v in self._anchors if v <= newest and v not in numbers]:
            self._anchors.pop(gone)
        # To ask for every manifest takes a call each: once a process, since its own versions are noted.
        noted = self._anchors.keys() >= set(numbers)
        whole = numbers if noted else [v for v in self._store.versions() if v <= newest]
        partial = {version for version in numbers if version < newest}.difference(whole)
        found = {version: self._is_anchor(version) for version in whole}
        self._anchors |= {v: is_anchor for v, is_anchor in found.items() if is_anchor is not None}
        # One that cannot be read counts as no anchor: nobody can build on it, and less is deleted for it.
        known = {version: bool(is_anchor) for version, is_anchor in found.items()}
        for version in [*superseded(known, held, self._keep, needed), *sorted(partial)]:
            self._store.delete(version)

    def _is_anchor(self, version: int) -> bool | None:
        """None where the manifest cannot be read, now or ever."""
        if version not in self._anchors:
            try:
                return self._store.manifest(version).is_anchor
            except WeightsError:
                return None
        return self._anchors[version]
