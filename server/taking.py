"""Takes one version: fetch, decode, swap. Everything slow or fallible is done before the engine is touched.

    Fetcher: files on this disk, verified -> chain -> patch against what the engine holds, or full shards, every
    tensor verified -> engine.load_weights -> housekeeping of what lies on the disk

Whatever fails leaves the old weights in the engine, and everything on the disk as it was.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from server.engines.base import ApplyReport, Engine, Weights
from server.metrics import Metrics
from server.states import Took
from server.status import Status, Update
from shared.chain import Chain, write_anchor, write_full, write_patch
from shared.digests import file_sha256
from shared.errors import RoomError, SpokeError, WeightsError
from shared.fleet import Head
from shared.manifest import FileEntry, Manifest
from shared.threads import in_daemon_thread

log = logging.getLogger("spoke.follower")

T = TypeVar("T")

UNTIDY = 5
"""Deltas of a chain that is tidied without waiting for a quiet moment."""
TAKE_S = 3600.0
"""Bound of one version's fetch, and of its decoding, seconds; a fetch goes on from where it was cut off. An engine
that hangs in a swap is the watch's concern (`server.life`): one that is cut off would leave nobody knows what."""


class Fetches(Protocol):
    """Brings versions to this disk (`server.fetching.Fetcher`)."""

    async def chain_to(self, head: Head) -> Chain:
        """Anchor and deltas of a head, on this disk and verified.

        Raises:
            WeightsError: a file cannot be had.
        """
        ...


class Holds(Protocol):
    """The versions on this disk (`server.holdings.Holdings`). Blocking: called in threads."""

    def complete(self, version: int, shards: Sequence[Path]) -> None:
        """Add an anchor's shards, written from this server's own chain."""
        ...

    def rebuild(self, version: int) -> None:
        """Write the full weights of a version for this server alone, where its chain has become long."""
        ...

    def forget_rebuilt(self) -> None:
        """Delete those."""
        ...

    def prune(self, version: int) -> None:
        """Delete what no version from this one on needs."""
        ...

    def forget(self, version: int) -> None:
        """Delete a version's files, so that they are fetched again."""
        ...


class _CameError(Exception):
    """A broadcast was faster."""


@dataclass(slots=True, kw_only=True)
class Taker:
    """Takes versions into one engine, one at a time.

    Args:
        fetcher: brings files.
        holdings: keeps them.
        engine: takes the weights.
        status: says what the engine holds; told what it took.
        folder: for patches and shards until the engine has read them; on the disk of the holdings.
        metrics: counts.
    """

    fetcher: Fetches
    holdings: Holds
    engine: Engine
    status: Status
    folder: Path
    metrics: Metrics
    _doubted: int | None = field(default=None, init=False)
    """Version whose files were all right and whose tensors were not: they were fetched again once."""
    _chain: Chain | None = field(default=None, init=False)
    """Of the weights in the engine, until it is tidied."""

    async def take(self, head: Head) -> Update | None:
        """Take a version and sample with it; None where a broadcast brought it, or a later one, meanwhile.

        Raises:
            WeightsError: its bytes cannot be had, are wrong, or do not fit the model.
            CoordinationError: Redis refused.
            EngineError: the engine failed.
            OSError: no room on the disk, or the bound is over.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(TAKE_S):
                chain = await self.fetcher.chain_to(head)
        except RoomError:
            await in_daemon_thread(self.holdings.forget_rebuilt)
            raise
        if chain.manifest.digest != head.manifest_digest:
            raise WeightsError("the store's manifest is not the one that was announced")
        fetched = time.monotonic()
        work = await in_daemon_thread(self._work, head.version)
        try:
            weights, decode_s, report = await self._swapped(chain, work)
        except _CameError:
            return None
        finally:
            await in_daemon_thread(shutil.rmtree, work, ignore_errors=True)
        self._chain = chain
        return self._measured(
            Update(
                version=head.version,
                encoding="full" if weights.base_digest is None else "patch",
                fetch_s=fetched - started,
                decode_s=decode_s,
                stage_s=report.stage_s,
                pause_s=report.pause_s,
                apply_s=report.apply_s,
            )
        )

    @property
    def untidy(self) -> bool:
        """Is the chain so long that it is tidied even where a newer version waits?"""
        return self._chain is not None and len(self._chain.deltas) >= UNTIDY

    async def tidy(self) -> None:
        """Make an anchor that came by its shortcut whole, delete what is not needed, shorten a long chain.

        Between two versions, so that nothing is deleted that is being read. It may fail: the weights are in place.
        """
        chain, self._chain = self._chain, None
        if chain is None:
            return
        version = chain.manifest.version
        try:
            await in_daemon_thread(self._made_whole, chain)
            await in_daemon_thread(self.holdings.prune, version)
            await in_daemon_thread(self.holdings.rebuild, version)
        except (SpokeError, OSError) as error:
            log.warning("version %d: what lies on the disk is not tidied: %s", version, error)

    def _made_whole(self, chain: Chain) -> None:
        """Write the shards of the newest anchor that came by its shortcut, where there is one."""
        for end in range(len(chain.deltas), 0, -1):
            manifest = chain.deltas[end - 1].manifest
            if manifest.is_anchor:
                part = Chain(anchor=chain.anchor, deltas=chain.deltas[:end])
                work = self._work(manifest.version)
                try:
                    self.holdings.complete(manifest.version, write_anchor(part, work))
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                return

    def _work(self, version: int) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"v{version:06d}-", dir=self.folder))

    async def _swapped(self, chain: Chain, work: Path) -> tuple[Weights, float, ApplyReport]:
        """What the engine took, the seconds that decoding took, and the swap's.

        Raises:
            _CameError: the engine needs none of it any more.
        """
        began = time.monotonic()
        patch = await self._decoded(self._patch, chain, work)
        decoded = time.monotonic()
        if patch is not None:
            try:
                return patch, decoded - began, await self._load(patch, chain.manifest)
            except WeightsError as error:
                log.warning("%s; version %d is loaded whole", error, patch.version)
        retried = time.monotonic()
        full = await self._decoded(_full, chain, work)
        return (
            full,
            time.monotonic() - retried + decoded - began,
            await self._load(full, chain.manifest),
        )

    async def _load(self, weights: Weights, manifest: Manifest) -> ApplyReport:
        """Give the engine a version, and say so before anybody else may give it another."""
        async with self.status.swaps.follower():
            if not self.status.standing.grows(weights.version):
                raise _CameError
            report = await self.engine.load_weights(weights)
            # Before anything else is awaited: who asks sees the engine and its digest agree.
            self.status.note(Took(weights.version, weights.digest))
            self.status.manifest = manifest
        return report

    async def _decoded(self, decode: Callable[[Chain, Path], T], chain: Chain, work: Path) -> T:
        """In a thread of its own: nothing here may touch the engine."""
        try:
            async with asyncio.timeout(TAKE_S):
                return await in_daemon_thread(decode, chain, work)
        except WeightsError as error:
            await self._doubt(chain, error)
            raise

    def _patch(self, chain: Chain, work: Path) -> Weights | None:
        """What changed since the weights in the engine; None where the chain does not know those."""
        base = self.engine.digest
        if not base:
            return None
        folder = work / "patch"
        folder.mkdir()
        files = write_patch(chain, base, folder)
        if files is None:
            return None
        manifest = chain.manifest
        return Weights(
            version=manifest.version,
            digest=manifest.weights_digest,
            files=files,
            base_digest=base,
        )

    async def _doubt(self, chain: Chain, error: WeightsError) -> None:
        """Forget the files that went bad on this disk; where none did, all of them, once."""
        if chain.anchor.rebuilt:
            # Of the files nothing is known yet; and where the disk was full, there is room now.
            log.warning("%s; version %d starts from its anchor", error, chain.manifest.version)
            await in_daemon_thread(self.holdings.forget_rebuilt)
            return
        bad = await in_daemon_thread(_bad, chain)
        version = chain.manifest.version
        if not bad:
            no_room = isinstance(error.__cause__, OSError)
            if no_room or self._doubted == version:
                return  # the same files would come again: the next version may be right
            self._doubted = version
            bad = [held.manifest.version for held in (chain.anchor, *chain.deltas)]
        log.warning("version %d: %s; versions %s are fetched again", version, error, bad)
        for one in bad:
            await in_daemon_thread(self.holdings.forget, one)

    def _measured(self, update: Update) -> Update:
        self.status.update = update
        for phase, seconds in update.phases().items():
            self.metrics.update_s.labels(phase).observe(seconds)
        log.info(
            "version %d (%s): fetched in %.0f ms, decoded and verified in %.0f ms, staged in %.0f ms, paused "
            "%.0f ms, of these applied in %.0f ms",
            update.version,
            update.encoding,
            *(1e3 * seconds for seconds in update.phases().values()),
        )
        return update


def _full(chain: Chain, work: Path) -> Weights:
    """All of the weights."""
    folder = work / "full"
    folder.mkdir()
    manifest = chain.manifest
    files = write_full(chain, folder)
    return Weights(version=manifest.version, digest=manifest.weights_digest, files=files)


def _bad(chain: Chain) -> list[int]:
    """Versions of a chain whose files have other bytes than their manifest says."""
    steps = [(chain.anchor, chain.anchor.manifest.files)]
    for held in chain.deltas:
        assert held.manifest.delta is not None, "a chain's step is a delta"
        steps.append((held, held.manifest.delta.files))
    return [
        held.manifest.version
        for held, files in steps
        if not all(_is_right(held.folder / entry.name, entry) for entry in files)
    ]


def _is_right(path: Path, entry: FileEntry) -> bool:
    try:
        return file_sha256(path) == entry.sha256
    except OSError:
        return False
