"""`GET /weights/live`, `/readyz` and `/info` of a server that follows: what is held, hashed where it stands."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import torch
from support import on_a_socket

from server.app import Holder, create_app
from server.live import Live
from server.states import CaughtUp, Heard, Took
from server.status import Status
from shared.digests import weights_digest
from shared.errors import BusyError, EngineError
from shared.fleet import Head
from shared.manifest import Manifest, TensorEntry
from tests.server.weight_run import FakeEngine, digests, service_of


def manifest(engine: FakeEngine) -> Manifest:
    """Of what an engine holds."""
    return Manifest(
        run="r", version=3, dtype="float32", files=(),
        tensors=tuple(
            TensorEntry(name=name, dtype="F32", shape=tuple(engine.tensors[name].shape), sha256=digest)
            for name, digest in digests(engine.tensors).items()
        ),
    ).seal()  # fmt: skip


@pytest.fixture
def engine() -> FakeEngine:
    made = FakeEngine()
    made.tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    return made


@pytest.fixture
def holder(engine: FakeEngine) -> Holder:
    """Serves version 3."""
    made = Holder(Status(server_id="s"))
    held = manifest(engine)
    engine.version, engine.digest = 3, held.weights_digest
    made.status.note(Took(3, held.weights_digest))
    made.status.manifest = held
    made.status.note(CaughtUp())
    made.service = service_of(engine)
    made.live = Live(engine, made.status)
    return made


@pytest.fixture
async def client(holder: Holder) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        on_a_socket(create_app(holder)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as client,
    ):
        yield client


async def test_the_live_digest_is_of_the_bytes_in_memory_at_each_request(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    found = (await client.get("/weights/live")).json()
    assert found == {
        "version": 3,
        "digest": engine.digest,
        "live_digest": engine.digest,
        "dtype": "float32",
        "rounded": None,
        "tensors": digests(engine.tensors),
    }
    engine.tensors["b"][2] += 1e-7
    found = (await client.get("/weights/live")).json()
    assert found["digest"] == engine.digest
    assert found["live_digest"] not in (None, engine.digest)
    assert found["live_digest"] == weights_digest(
        (name, "F32", tuple(tensor.shape), digests(engine.tensors)[name])
        for name, tensor in engine.tensors.items()
    )


async def test_an_engine_of_fewer_bits_says_why_its_digests_cannot_agree(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.info.dtype = "bfloat16"
    engine.tensors["a"] += 1e-4  # as rounding does
    found = (await client.get("/weights/live")).json()
    assert found["live_digest"] != found["digest"]
    assert "float32 is published and this engine keeps bfloat16" in found["rounded"]


@pytest.mark.parametrize("change", ["missing", "unknown"])
async def test_a_tensor_too_few_or_too_many_is_another_digest(
    client: httpx.AsyncClient, engine: FakeEngine, change: str
) -> None:
    if change == "missing":
        del engine.tensors["b"]
    else:
        engine.tensors["c"] = torch.zeros(1)
    found = (await client.get("/weights/live")).json()
    assert found["live_digest"] != found["digest"] == engine.digest


async def test_a_checkpoint_has_nothing_to_be_compared_with(
    client: httpx.AsyncClient, engine: FakeEngine, holder: Holder
) -> None:
    engine.version, engine.digest = 0, ""
    holder.status.standing = Status(server_id="s").standing
    holder.status.manifest = None
    found = (await client.get("/weights/live")).json()
    assert (found["version"], found["digest"], found["live_digest"]) == (0, "", None)
    assert found["tensors"] == digests(engine.tensors)


async def test_new_weights_meanwhile_begin_it_again(engine: FakeEngine, holder: Holder) -> None:
    hash_all, calls = engine.live_digests, []

    async def moving(dtype: str) -> dict[str, str]:
        found = await hash_all(dtype)
        if len(calls) < moves:
            calls.append(dtype)
            engine.version += 1
            holder.status.note(Took(engine.version, f"w{engine.version}"))
        return found

    engine.live_digests = moving  # type: ignore[method-assign]
    live, moves = Live(engine, holder.status), 2
    assert (await live.weights()).version == 5
    moves = 10**6
    with pytest.raises(BusyError, match="ask again"):
        await live.weights()


async def test_an_engine_that_cannot_tell_is_a_503(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def unable(dtype: str) -> dict[str, str]:
        raise EngineError("its parameters are packed")

    engine.live_digests = unable  # type: ignore[method-assign]
    answer = await client.get("/weights/live")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert "packed" in answer.json()["detail"]


async def test_one_caller_at_a_time(engine: FakeEngine, holder: Holder) -> None:
    at_once, most = 0, 0

    async def slow(dtype: str) -> dict[str, str]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return {}

    engine.live_digests = slow  # type: ignore[method-assign]
    live = Live(engine, holder.status)
    await asyncio.gather(*(live.weights() for _ in range(5)))
    assert most == 1


async def test_a_stale_server_says_how_far_behind_it_is(
    client: httpx.AsyncClient, holder: Holder
) -> None:
    ready = await client.get("/readyz")
    assert ready.json() == {
        "status": "ready", "version": 3, "head": None, "lag": 0, "max_staleness": None,
    }  # fmt: skip
    head = Head(
        version=7, manifest_digest="m", weights_digest="w", store="file:///s", max_staleness=1
    )
    holder.status.note(Heard(head))
    for path in ("/readyz", "/v1/models"):
        answer = await client.get(path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        said = (
            "this server is stale: it holds version 3, the run is at 7, at most 1 behind may serve"
        )
        assert answer.json()["detail"] == said
    assert (await client.get("/weights/live")).status_code == 200


async def test_nothing_is_told_before_the_model_is_loaded() -> None:
    app = create_app(Holder(Status(server_id="s")))
    async with (
        on_a_socket(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        answer = await client.get("/weights/live")
    assert answer.status_code == 503
    assert answer.json()["detail"] == "this server is loading"
