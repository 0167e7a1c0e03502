"""Weights by broadcast into a real vLLM engine, over HTTP and gloo: the whole way but NCCL itself."""

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from support import on_a_socket

from server.app import Holder, create_app
from server.engines.base import Engine, GenerateRequest
from server.engines.settings import EngineSettings
from server.live import Live
from server.states import CaughtUp, Heard
from server.status import Status
from shared.digests import sha256
from shared.errors import EngineError, WeightsError
from shared.fleet import Head
from shared.manifest import Manifest, TensorEntry
from shared.transfer import TransferBackend
from tests.server.weight_run import service_of
from trainer.transfer import Broadcast, group

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

ASK = GenerateRequest(
    prompt_token_ids=tuple(range(5, 70)), samples=1, max_tokens=200, temperature=0.0, seed=0
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Served:
    """A server that follows a run, which in this test announces by hand."""

    engine: Engine
    status: Status
    client: httpx.AsyncClient
    url: str

    def announce(self, version: Manifest) -> None:
        head = Head(
            version=version.version,
            manifest_digest=version.digest,
            weights_digest=version.weights_digest,
            store="file:///s",
        )
        self.status.note(Heard(head))

    async def tokens(self) -> list[int]:
        return (await self.engine.generate(ASK)).completions[0].token_ids

    def met(self, timeout_s: float = 20.0) -> contextlib.AbstractAsyncContextManager[Broadcast]:
        return group(
            self.client,
            [self.url],
            backend=TransferBackend.GLOO,
            address="127.0.0.1",
            device=torch.device("cpu"),
            timeout_s=timeout_s,
        )


@contextlib.asynccontextmanager
async def served(model: Path) -> AsyncIterator[Served]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from server.engines.vllm import open_engine
    engine = await open_engine(
        EngineSettings(
            model=str(model), dtype="float32", seed=0, kv_cache_gib=0.25, weight_transfer="gloo"
        )
    )
    holder = Holder(Status(server_id="s"))
    holder.status.note(CaughtUp())
    holder.service = service_of(engine)
    holder.live = Live(engine, holder.status)
    try:
        async with (
            on_a_socket(create_app(holder, transfers=True)) as port,
            httpx.AsyncClient(timeout=60.0) as client,
        ):
            yield Served(engine, holder.status, client, f"http://127.0.0.1:{port}")
    finally:
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


def manifest(version: int, tensors: Tensors) -> Manifest:
    entries = tuple(
        TensorEntry(
            name=name,
            dtype="F32",
            shape=tuple(tensor.shape),
            sha256=sha256(tensor.contiguous().numpy().tobytes()),
        )
        for name, tensor in tensors.items()
    )
    return Manifest(run="r", version=version, dtype="float32", tensors=entries, files=()).seal()


async def test_a_broadcast_reaches_the_live_weights_under_running_requests(tiny_math, old):
    new = moved(old, 1)
    first, again, wrong = manifest(1, new), manifest(2, old), manifest(3, new)
    async with served(tiny_math) as server:
        before = await server.tokens()
        async with server.met() as broadcast:
            # A trainer that lost its lease announces nothing, and so reaches nobody.
            other = manifest(1, moved(old, 7))
            server.announce(first)
            with pytest.raises(
                WeightsError, match=r"409.*version 1 is announced, not this version"
            ):
                await broadcast.send(other, new)
            assert server.engine.version == 0

            # While a request runs: its tokens before are the old version's, those after it the new one's.
            began = asyncio.Event()
            running = asyncio.create_task(
                server.engine.generate(replace(ASK, on_news=lambda news: began.set()))
            )
            await asyncio.wait_for(began.wait(), 60)
            await broadcast.send(first, new)
            crossing = (await running).completions[0]
            assert [version for version, _ in crossing.versions] == [0, 1]
            kept = crossing.versions[0][1]
            assert crossing.token_ids[:kept] == before[:kept]
            assert (server.status.standing.version, server.status.standing.holds_head) == (1, True)
            live = (await server.client.get(f"{server.url}/weights/live")).json()
            assert (live["version"], live["live_digest"]) == (1, first.weights_digest)
            assert await server.tokens() != before

            # The group stays. Back to the old weights: the same tokens again.
            server.announce(again)
            await broadcast.send(again, old)
            assert await server.tokens() == before
            with pytest.raises(WeightsError, match=r"409"):
                await broadcast.send(first, new)

        with pytest.raises(WeightsError, match=r"409.*in no transfer group"):
            await broadcast.send(again, old)

        # A trainer that restarts makes a new group. Bytes other than the announced ones are never sampled with.
        async with server.met() as broadcast:
            server.announce(wrong)
            with pytest.raises(WeightsError, match="are not the announced ones"):
                await broadcast.send(wrong, moved(old, 2))
        assert "given up" in str(await asyncio.wait_for(server.engine.died(), 30))
        with pytest.raises(EngineError, match="given up"):
            await server.tokens()
        assert server.status.standing.version == 2


async def test_a_trainer_that_dies_in_a_broadcast_ends_the_engine_and_one_that_never_comes_does_not(
    tiny_math, old
):
    new = moved(old, 1)
    version = manifest(1, new)
    async with served(tiny_math) as server:
        before = await server.tokens()
        server.announce(version)
        join = {
            "backend": "gloo",
            "address": "127.0.0.1",
            "port": 1,
            "rank": 1,
            "size": 2,
            "timeout_s": 2.0,
        }
        answer = await server.client.post(f"{server.url}/weight_transfer/join", json=join)
        assert answer.status_code == 503
        assert await server.tokens() == before

        async with server.met(timeout_s=3.0) as broadcast:
            part = version.model_copy(update={"tensors": version.tensors[:3]})
            receiving = asyncio.create_task(
                server.client.post(
                    f"{server.url}/weight_transfer/receive",
                    json={"manifest": version.model_dump(mode="json")},
                )
            )
            assert await asyncio.to_thread(broadcast._broadcast, part, new) is None
            answer = await receiving  # the rest never comes
            assert answer.status_code == 503
        assert "given up" in str(await asyncio.wait_for(server.engine.died(), 30))
        assert server.status.standing.version == 0
