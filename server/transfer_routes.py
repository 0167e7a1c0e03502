"""Routes by which a trainer of the same cluster broadcasts weights: scope `admin`, and only what is announced.

The trainer meets the servers (`join`), asks whether all can take a version (`check`), lets them receive while it
broadcasts (`receive`), and lets them go (`leave`). A server knows the head from Redis, so that a trainer that lost
its lease, whose versions are not announced, reaches nobody. What is received is acknowledged by the follower.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from server.engines.base import ApplyReport, Transfer, transfer_of
from server.metrics import Metrics
from server.openapi import refusals
from server.service import RolloutService
from server.states import Took
from server.status import Status, Update
from shared.errors import BusyError, WeightsError
from shared.manifest import Manifest
from shared.transfer import TransferGroup, TransferOffer

log = logging.getLogger("spoke.follower")

HEAD_S = 10.0
"""Longest wait for the head that a trainer has just announced."""
TURN_S = 10.0
"""Longest wait for a version that the engine takes from the store just now."""
_POLL_S = 0.02


class Served(Protocol):
    """What the routes reach (`server.app.Holder`)."""

    status: Status
    """Told of what was received."""
    service: RolloutService | None
    """None before the model is loaded."""
    metrics: Metrics
    """Counts updates."""


def add_transfer_routes(app: FastAPI, served: Served) -> None:
    """Add the routes to an application."""
    broadcasts, swaps = _Broadcasts(served), served.status.swaps

    @app.post("/weight_transfer/join", responses=refusals(409, 422, 503))
    async def join(group: TransferGroup) -> dict[str, str]:
        """Meet the trainer and the other servers; the engine samples nothing until all are there."""
        with _refusing():
            await broadcasts.engine().join(group)
        return {"status": "joined"}

    @app.post("/weight_transfer/check", responses=refusals(409, 422, 503))
    async def check(offer: TransferOffer) -> dict[str, str]:
        """Could this version be received now? Then nothing else is, until it has come or a while is over."""
        with _refusing():
            await broadcasts.announced(offer)
            broadcasts.engine().check(offer)
            broadcasts.fits(offer)
            await broadcasts.promised()
        return {"status": "ready"}

    @app.post("/weight_transfer/receive", responses=refusals(409, 422, 503))
    async def receive(offer: TransferOffer) -> ApplyReport:
        """Take the version that the trainer broadcasts now."""
        with _refusing():
            await broadcasts.announced(offer)
            async with swaps.broadcast():
                report = await broadcasts.engine().receive(offer)
                broadcasts.took(offer.manifest, report)
        return report

    @app.post("/weight_transfer/leave", responses=refusals(503))
    async def leave() -> dict[str, str]:
        """Leave the group."""
        swaps.withdraw()
        await broadcasts.engine().leave()
        return {"status": "left"}


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What a version is refused for is no fault of the request's form."""
    try:
        yield
    except WeightsError as error:
        raise HTTPException(409, str(error)) from error


@dataclass(frozen=True, slots=True)
class _Broadcasts:
    """What one server asks before it receives, and notes afterwards."""

    served: Served

    def engine(self) -> Transfer:
        """The engine's end of a group; raises what a request is refused with where there is none."""
        if self.served.service is None:
            raise BusyError(self.served.status.standing.refusal)
        found = transfer_of(self.served.service.engine)
        if found is None:
            raise HTTPException(
                409, "this engine takes no broadcasts: start it with --weight-transfer"
            )
        return found

    async def announced(self, offer: TransferOffer) -> None:
        """Raise WeightsError unless a version is the head, which may be on its way here."""
        deadline = time.monotonic() + HEAD_S
        while True:
            head = self.served.status.standing.head
            if head is not None and head.version >= offer.manifest.version:
                break
            if time.monotonic() > deadline:
                raise WeightsError(
                    f"version {offer.manifest.version} is not announced, as far as this server knows"
                )
            await asyncio.sleep(_POLL_S)
        if (head.version, head.manifest_digest) != (offer.manifest.version, offer.manifest.digest):
            raise WeightsError(
                f"version {head.version} is announced, not this version {offer.manifest.version}"
            )

    def fits(self, offer: TransferOffer) -> None:
        """Raise WeightsError where the engine could not load the tensors, or not prove that it did."""
        assert self.served.service is not None, "asked after `engine`"
        own, theirs = self.served.service.engine.info.dtype, offer.manifest.dtype
        if offer.verify and own != theirs:
            raise WeightsError(
                f"dtype: {theirs} is published, this engine computes in {own}: its tensors have other hashes"
            )
        held = self.served.status.manifest
        if held is not None and _shapes(held) != _shapes(offer.manifest):
            raise WeightsError(
                f"tensors: they are not those of version {held.version}, which is held"
            )

    async def promised(self) -> None:
        """Have the follower keep away; raise WeightsError where it is at a swap of its own for too long."""
        deadline = time.monotonic() + TURN_S
        while not self.served.status.swaps.promise():
            if time.monotonic() > deadline:
                raise WeightsError("this server takes a version from the store just now")
            await asyncio.sleep(_POLL_S)

    def took(self, manifest: Manifest, report: ApplyReport) -> None:
        """Note a version that the engine has received."""
        status, metrics = self.served.status, self.served.metrics
        status.note(Took(manifest.version, manifest.weights_digest))
        status.manifest = manifest
        status.update = Update(
            version=manifest.version,
            encoding="broadcast",
            fetch_s=0.0,
            decode_s=0.0,
            stage_s=report.stage_s,
            pause_s=report.pause_s,
            apply_s=report.apply_s,
        )
        log.info("version %d (broadcast): paused %.0f ms", manifest.version, 1e3 * report.pause_s)
        metrics.updates.labels("ok").inc()
        metrics.update_s.labels("pause").observe(report.pause_s)
        metrics.update_s.labels("apply").observe(report.apply_s)


def _shapes(manifest: Manifest) -> set[tuple[str, str, tuple[int, ...]]]:
    return {(t.name, t.dtype, t.shape) for t in manifest.tensors}
