"""Broadcasting that cannot work: it costs a bounded time and a line, never the version."""

import asyncio
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from support import free_port

from shared.errors import CoordinationError
from shared.fleet import ServerRecord, ServerState
from shared.manifest import Manifest
from shared.transfer import TransferBackend
from trainer.broadcasting import Broadcasting
from trainer.settings import FleetSettings

VERSION = Manifest(run="r", version=1, dtype="float32", tensors=(), files=())


class Fleet:
    """The fleet table, and what the trainer says."""

    def __init__(self, *records: ServerRecord) -> None:
        self.records: list[ServerRecord] | None = list(records)
        self.said: list[str] = []

    async def servers(self) -> list[ServerRecord]:
        if self.records is None:
            raise CoordinationError("Redis is away")
        return self.records

    def broadcasting(self, client: httpx.AsyncClient, address: str = "127.0.0.1") -> Broadcasting:
        return Broadcasting(
            servers=self.servers, client=client, backend=TransferBackend.GLOO, address=address,
            device=torch.device("cpu"), timeout_s=0.5, tell=self.said.append,
        )  # fmt: skip


def record(**about: Any) -> ServerRecord:
    usual = {
        "server_id": "s", "url": f"http://127.0.0.1:{free_port()}", "state": ServerState.READY, "version": 0,
        "digest": "d", "model": "m", "engine": "vllm", "transfer": "gloo", "updated_at": 0.0,
    }  # fmt: skip
    return ServerRecord.model_validate(usual | about)


@pytest.mark.parametrize(
    "about", [{"transfer": None}, {"transfer": "nccl"}, {"state": "stale"}, {"state": "loading"}]
)
async def test_servers_that_cannot_take_part_are_left_to_the_store(about: dict[str, Any]) -> None:
    fleet = Fleet(record(**about))
    async with httpx.AsyncClient() as client:
        made = fleet.broadcasting(client)
        await made.meet()
        assert not await made.send(VERSION, {})
    assert fleet.said == []


async def test_a_server_that_is_gone_costs_a_line_and_is_tried_less_and_less_often() -> None:
    gone = record()
    fleet = Fleet(gone)
    tried = []
    async with httpx.AsyncClient() as client, asyncio.timeout(20.0):
        made = fleet.broadcasting(client)
        for version in range(8):
            before = len(fleet.said)
            await made.meet()
            assert not await made.send(VERSION, {})
            tried += [version] * (len(fleet.said) - before)
    assert tried == [0, 1, 3, 7]
    assert fleet.said[0].startswith(f"no transfer group: {gone.url}/weight_transfer/join: ")
    assert fleet.said[0].endswith("; the servers take it from the store")
    assert fleet.said[3].endswith("; the servers take it from the store; the next 7 versions too")


async def test_an_address_that_is_not_of_this_machine_is_named() -> None:
    fleet = Fleet(record())
    async with httpx.AsyncClient() as client, asyncio.timeout(20.0):
        await fleet.broadcasting(client, address="no-such-host.invalid").meet()
    assert fleet.said[0].startswith("no transfer group: transfer_address no-such-host.invalid: ")


async def test_without_redis_nothing_is_tried() -> None:
    fleet = Fleet()
    fleet.records = None
    async with httpx.AsyncClient() as client:
        await fleet.broadcasting(client).meet()
    assert fleet.said == []


def test_a_broadcast_needs_the_trainers_address() -> None:
    with pytest.raises(ValidationError, match="needs transfer_address"):
        FleetSettings(weight_transfer="nccl")
    assert FleetSettings(weight_transfer="nccl", transfer_address="10.0.0.1").transfer_s == 60
