"""A real server follows a run of deltas: what it says it holds is what stands in its engine's memory, to the bit.

1. The first version comes whole, the next ones as patches, missed ones as one; `/weights/live` proves each.
2. Where versions cannot be had it turns stale, says so, and is back once they can.
3. A server that is killed and starts again with the same folder catches up before it serves.
"""

import asyncio
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file
from support import running_server

from shared.fleet import Head, ServerState
from tests.server.weight_run import Run

BODY = {
    "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "plan": {"kind": "group", "samples": 2},
    "sampling": {"temperature": 1.0, "max_tokens": 20},
}


async def assert_holds(client: httpx.AsyncClient, run: Run, head: Head, *, how: str) -> None:
    """The fleet table, `/info` and the engine's own memory agree."""
    await run.record(lambda r: (r.version, r.digest) == (head.version, head.weights_digest))
    live = (await client.get("/weights/live")).json()
    assert live["version"] == head.version
    assert live["live_digest"] == live["digest"] == head.weights_digest
    assert live["tensors"] == run.digests[head.version]
    held = (await client.get("/info")).json()["weights"]
    assert held["last_update"]["encoding"] == how
    ready = (await client.get("/readyz")).json()
    assert ready == {
        "status": "ready", "version": head.version, "head": head.version, "lag": 0, "max_staleness": 1,
    }  # fmt: skip
    tree = (await client.post("/rollout_tree", json=BODY)).json()
    assert tree["weight_versions"] == {"min": head.version, "max": head.version}


@pytest.mark.parametrize(
    "engine", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])]
)
async def test_what_is_held_is_what_is_in_memory_through_patches_staleness_and_a_kill(
    engine: str, tiny_math: Path, redis_url: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, redis_url, load_file(tiny_math / "model.safetensors"))
    try:
        await follow(run, engine, tiny_math, redis_url, tmp_path)
    finally:
        await run.coordinator.close()


async def follow(run: Run, engine: str, tiny_math: Path, redis_url: str, tmp_path: Path) -> None:
    """All of it, on one engine."""
    arguments: Any = (
        "--engine", engine, "--dtype", "float32", "--redis-url", redis_url, "--run", run.name,
        "--weights-dir", str(tmp_path / "weights"), "--max-model-len", "256",
    )  # fmt: skip
    first = await run.publish()
    with running_server(tiny_math, tmp_path / "one.log", *arguments) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            await assert_holds(client, run, first, how="full")
            await assert_holds(client, run, await run.publish(), how="patch")
            await assert_holds(client, run, await run.publish(3, anchor=True), how="patch")

            head = await run.make(3)
            away = run.root.rename(run.root.with_name("away"))
            await run.announce(head)
            await run.record(lambda r: r.state is ServerState.STALE)
            for answer in (
                await client.post("/rollout_tree", json=BODY),
                await client.get("/readyz"),
            ):
                assert answer.status_code == 503
                assert "holds version 4, the run is at 7, at most 1" in answer.json()["detail"]
                assert int(answer.headers["retry-after"]) >= 1
            away.rename(run.root)
            await assert_holds(client, run, head, how="patch")
        server.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(server.process.wait, 20)
    newest = await run.make()
    await run.announce(newest)
    # All but the newest version is here already.
    for version in range(newest.version):
        shutil.rmtree(run.folder(version))
    with running_server(tiny_math, tmp_path / "two.log", *arguments) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            await assert_holds(client, run, newest, how="full")
