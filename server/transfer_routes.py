"""Routes by which a trainer of the same cluster broadcasts weights: scope `admin`, and only what is announced.

The trainer meets the servers (`join`), asks whether all can take a version (`check`), lets them receive while it
broadcasts (`receive`), and lets them go (`leave`). A server knows the head from Redis, so that a trainer that lost
its lease, whose versions are not announced, reaches nobody.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from server.engines.base import ApplyReport, TakesTransfers, Transfer
from server.openapi import refusals
from server.service import RolloutService
from server.states import Took
from server.status import Status
from shared.errors import BusyError, WeightsError
from shared.transfer import TransferGroup, TransferOffer

HEAD_S = 10.0
"""Longest wait for the head that a trainer has just announced."""
_POLL_S = 0.02


class Served(Protocol):
    """What the routes reach (`server.app.Holder`)."""

    status: Status
    """Told of what was received."""
    service: RolloutService | None
    """None before the model is loaded."""


def add_transfer_routes(app: FastAPI, served: Served) -> None:
    """Add the routes to an application."""
    status = served.status

    def transfer() -> Transfer:
        if served.service is None:
            raise BusyError(status.standing.refusal)
        engine = served.service.engine
        if not isinstance(engine, TakesTransfers) or engine.transfer is None:
            raise HTTPException(
                409, "this engine takes no broadcasts: start it with --weight-transfer"
            )
        return engine.transfer

    @contextlib.contextmanager
    def refusing() -> Iterator[None]:
        try:
            yield
        except WeightsError as error:
            raise HTTPException(409, str(error)) from error

    async def announced(offer: TransferOffer) -> None:
        """Raise WeightsError unless a version is the head, which may be on its way here."""
        deadline = time.monotonic() + HEAD_S
        while True:
            head = status.standing.head
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

    @app.post("/weight_transfer/join", responses=refusals(409, 422, 503))
    async def join(group: TransferGroup) -> dict[str, str]:
        """Meet the trainer and the other servers; the engine samples nothing until all are there."""
        with refusing():
            await transfer().join(group)
        return {"status": "joined"}

    @app.post("/weight_transfer/check", responses=refusals(409, 422, 503))
    async def check(offer: TransferOffer) -> dict[str, str]:
        """Could this version be received now?"""
        with refusing():
            await announced(offer)
            transfer().check(offer)
        return {"status": "ready"}

    @app.post("/weight_transfer/receive", responses=refusals(409, 422, 503))
    async def receive(offer: TransferOffer) -> ApplyReport:
        """Take the version that the trainer broadcasts now."""
        with refusing():
            await announced(offer)
            report = await transfer().receive(offer)
        status.note(Took(offer.manifest.version, offer.manifest.weights_digest))
        status.manifest = offer.manifest
        return report

    @app.post("/weight_transfer/leave", responses=refusals(503))
    async def leave() -> dict[str, str]:
        """Leave the group."""
        await transfer().leave()
        return {"status": "left"}
