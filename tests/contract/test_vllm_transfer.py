"""Weights by broadcast into a real vLLM engine: the whole way but NCCL itself, by gloo between CPUs."""

import asyncio
import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from server.engines.base import GenerateRequest
from server.engines.settings import EngineSettings
from shared.errors import EngineError, WeightsError
from shared.fleet import Head
from shared.transfer import TransferBackend, TransferGroup, TransferOffer
from trainer.transfer import offer_of

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

ASK = GenerateRequest(
    prompt_token_ids=tuple(range(5, 70)), samples=1, max_tokens=200, temperature=0.0, seed=0
)
Tensors = dict[str, torch.Tensor]


@pytest_asyncio.fixture(loop_scope="session")
async def engine(tiny_math: Path) -> AsyncIterator:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from server.engines.vllm import open_engine
    engine = await open_engine(
        EngineSettings(
            model=str(tiny_math), dtype="float32", seed=0, kv_cache_gib=0.25, weight_transfer="gloo"
        )
    )
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def old(tiny_math: Path) -> Tensors:
    return load_file(tiny_math / "model.safetensors")


def moved(tensors: Tensors, seed: int) -> Tensors:
    """Another model of the same shape."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=noise))
        for name, tensor in tensors.items()
    }


def offer(version: int, tensors: Tensors) -> TransferOffer:
    digest = f"digest-{version}"
    head = Head(version=version, manifest_digest="m", weights_digest=digest, store="file:///s")
    return offer_of(head, tensors)


async def met(engine, timeout_s: float = 20.0) -> torch.distributed.ProcessGroup:
    """A group of this process and the engine."""
    bound = timedelta(seconds=timeout_s)
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=bound)
    group = TransferGroup(
        backend=TransferBackend.GLOO, address="127.0.0.1", port=store.port, rank=1, size=2, timeout_s=timeout_s
    )  # fmt: skip
    opened = asyncio.to_thread(torch.distributed.ProcessGroupGloo, store, 0, 2, bound)
    connection, _ = await asyncio.gather(opened, engine.transfer.join(group))
    return connection


async def send(connection, tensors: Tensors) -> None:
    def broadcast() -> None:
        for tensor in tensors.values():
            connection.broadcast(tensor.contiguous(), 0).wait()

    await asyncio.to_thread(broadcast)


async def test_a_broadcast_reaches_the_live_tensors_under_running_requests_and_a_bad_one_ends_the_engine(
    engine, old
):
    with pytest.raises(WeightsError, match="in no transfer group"):
        await engine.transfer.receive(offer(1, old))
    before = (await engine.generate(ASK)).completions[0]
    connection = await met(engine)

    # A version while a request runs: its tokens before are the old version's, those after it the new one's.
    new, began = moved(old, 1), asyncio.Event()
    running = asyncio.create_task(engine.generate(replace(ASK, on_news=lambda news: began.set())))
    await asyncio.wait_for(began.wait(), 60)
    report, _ = await asyncio.gather(engine.transfer.receive(offer(1, new)), send(connection, new))
    crossing = (await running).completions[0]
    assert (engine.version, engine.digest) == (1, "digest-1")
    assert report.pause_s > report.apply_s > 0
    assert [version for version, _ in crossing.versions] == [0, 1]
    kept = crossing.versions[0][1]
    assert crossing.token_ids[:kept] == before.token_ids[:kept]
    expected = {tensor.name: tensor.sha256 for tensor in offer(1, new).tensors}
    assert await engine.live_digests("float32") == expected
    after = (await engine.generate(ASK)).completions[0]
    assert after.token_ids != before.token_ids

    # The group stays: the next version needs no new one. And back to the old weights: the same tokens again.
    await asyncio.gather(engine.transfer.receive(offer(2, old)), send(connection, old))
    assert (await engine.generate(ASK)).completions[0].token_ids == before.token_ids
    with pytest.raises(WeightsError, match="version 2 does not follow version 2"):
        await engine.transfer.receive(offer(2, new))

    # Leave and meet again: a trainer that restarts makes a new group.
    await engine.transfer.leave()
    connection = await met(engine)

    # Bytes that are not the announced ones are never sampled with.
    waiting = asyncio.create_task(engine.died())
    with pytest.raises(EngineError, match="are not the announced ones"):
        await asyncio.gather(
            engine.transfer.receive(offer(3, new)), send(connection, moved(old, 2))
        )
    assert "given up" in str(await asyncio.wait_for(waiting, 30))
    with pytest.raises(EngineError, match="given up"):
        await engine.generate(ASK)
