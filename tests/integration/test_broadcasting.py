"""Versions by broadcast from the trainer's own parts into a real vLLM server, over gloo, with the store beside it.

1. The first version comes from the store, which proves that it fits; then versions come by broadcast.
2. A broken group costs a line: the server takes that version from the store, as a patch on what was broadcast.
3. The group is formed again for the next version, in the background as well.
Each time the bytes in the engine's memory are the published ones.
"""

import asyncio
import uuid
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from support import running_server
from torch import Tensor

from shared.fleet import Head
from tests.server.weight_run import digests
from trainer.config import TrainSettings
from trainer.prepare import Connections, connect
from trainer.publication import Publication

pytestmark = pytest.mark.vllm


def settings_of(redis_url: str, run: str, model: Path) -> TrainSettings:
    fleet = {
        "redis_url": redis_url, "dtype": "float32", "wait_s": 20, "pause_s": 20,
        "weight_transfer": "gloo", "transfer_address": "127.0.0.1", "transfer_s": 10,
    }  # fmt: skip
    return TrainSettings.model_validate(
        {
            "run": run,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": "problems:train?count=1", "heldout": "problems:heldout?count=1"},
            "rollout": {"questions": 1, "plan": {"kind": "group", "samples": 2}},
            "algorithm": {"name": "grpo"},
            "trainer": {"steps": 1},
            "fleet": fleet,
        }
    )


def moved(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A few elements of each tensor changed."""
    random = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in tensors.items():
        changed[name] = tensor.clone()
        changed[name].view(-1)[torch.randint(tensor.numel(), (5,), generator=random)] += 0.25
    return changed


async def assert_holds(
    client: httpx.AsyncClient, to: Connections, head: Head, tensors: dict[str, Tensor], how: str
) -> None:
    live = (await client.get("/weights/live")).json()
    assert (live["version"], live["live_digest"]) == (head.version, head.weights_digest)
    assert live["tensors"] == digests(tensors)
    held = (await client.get("/info")).json()["weights"]
    assert (held["last_update"]["encoding"], held["failure"]) == (how, None)
    report = to.publisher.reports()[-1]
    assert (report.broadcast_s is not None) == (how == "broadcast")


async def test_versions_come_by_broadcast_and_from_the_store_where_that_breaks(
    tiny_math: Path, redis_url: str, tmp_path: Path
) -> None:
    run = f"broadcast-{uuid.uuid4().hex[:8]}"
    said: list[str] = []
    arguments = (
        "--engine", "vllm", "--dtype", "float32", "--redis-url", redis_url, "--run", run,
        "--weight-transfer", "gloo", "--max-model-len", "256", "--kv-cache-gib", "0.25",
    )  # fmt: skip
    with running_server(tiny_math, tmp_path / "server.log", *arguments) as server:
        async with (
            connect(settings_of(redis_url, run, tiny_math), tmp_path / "run", said.append) as to,
            httpx.AsyncClient(base_url=server.url, timeout=60.0) as client,
        ):
            tensors = load_file(tiny_math / "model.safetensors")

            async def publish(version: int, how: str) -> None:
                nonlocal tensors
                tensors = moved(tensors, version)
                head = await to.publisher.publish(version, tensors)
                await to.patience.followed(head)
                await assert_holds(client, to, head, tensors, how)

            await publish(1, "full")
            said.clear()  # while it is taken, nobody serves
            await publish(2, "broadcast")
            assert said == []

            (await client.post("/weight_transfer/leave")).raise_for_status()
            await publish(3, "patch")
            assert len(said) == 1
            assert "in no transfer group" in said[0]
            assert said[0].endswith("the servers take it from the store")

            publication = Publication(to.publisher, to.patience)
            heads: list[Head] = []

            def followed(head: Head, holders: object) -> None:
                heads.append(head)

            publication.followed = followed
            tensors = moved(tensors, 4)
            publication.start(4, tensors, 0.0)
            await asyncio.wait_for(publication.settled(), 20)
            await assert_holds(client, to, heads[-1], tensors, "broadcast")
            assert len(said) == 1
