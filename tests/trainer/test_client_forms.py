"""The forms of an answer: packed, JSON, or nodes as they finish.

The streams here are a fake server's, so that they break where a test says.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from fake_rollouts import ANSWER, REQUEST, Fake, asking
from fastapi.responses import Response, StreamingResponse

from shared import codec, stream
from shared.errors import RequestError
from shared.media import MediaType
from shared.wire import (
    Problem,
    RolloutTreeResponse,
)
from trainer.client import AsyncClient, NodeLine

TREE = RolloutTreeResponse.model_validate(
    ANSWER | {"nodes": [*ANSWER["nodes"], ANSWER["nodes"][1] | {"id": 2, "text": "a\u2028b\x85c"}]}  # type: ignore[misc]
)
LINES = [line.encode() for line in stream.lines(TREE)]


def streamed(*pieces: bytes, then: Callable[[], None] = lambda: None) -> StreamingResponse:
    async def body() -> Any:
        for piece in pieces:
            yield piece
        then()

    return StreamingResponse(body(), media_type="application/x-ndjson")


async def test_the_packed_form_is_asked_for_and_read(fake: Fake) -> None:
    packed = codec.encode(TREE, MediaType.MSGPACK)
    server = fake(
        lambda i: (
            Response(packed, media_type="application/msgpack")
            if i == 0
            else Response(
                codec.compress(packed),
                media_type="application/msgpack",
                headers={"Content-Encoding": "zstd"},
            )
        )
    )
    async with AsyncClient(server.url) as client:
        assert [await client.rollout_tree(REQUEST) for _ in range(2)] == [TREE, TREE]
    assert server.headers[0]["accept"] == "application/msgpack, application/json;q=0.5"
    assert "zstd" in server.headers[0]["accept-encoding"]


async def test_a_damaged_packed_answer_is_asked_for_again(fake: Fake) -> None:
    packed = codec.encode(TREE, MediaType.MSGPACK)
    server = fake(
        lambda i: Response(packed if i else packed[:-5], media_type="application/msgpack")
    )
    async with AsyncClient(server.url) as client:
        assert await client.rollout_tree(REQUEST) == TREE
    assert len(server.bodies) == 2


async def test_a_tree_that_is_too_large_is_refused_at_once(fake: Fake) -> None:
    """Any server would give it again; sampling it once was costly enough."""
    document = msgpack.unpackb(codec.encode(TREE, MediaType.MSGPACK))
    document["nodes"]["token_ids"]["data"] = codec.compress(bytes(codec.LIMIT_BYTES + 4))
    body = msgpack.packb(document)
    server = fake(lambda i: Response(body, media_type="application/msgpack"))
    async with AsyncClient(server.url, timeout_s=10) as client:
        with pytest.raises(RequestError, match=f"{codec.LIMIT_BYTES} are allowed .LIMIT_BYTES"):
            await client.rollout_tree(REQUEST)
    assert len(server.bodies) == 1


async def test_nodes_come_while_the_tree_is_still_sampled(fake: Fake) -> None:
    """The server sends the rest only once the first node has been told."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    seen: list[str] = []

    async def body() -> Any:
        yield LINES[0] + LINES[1][:20]
        yield LINES[1][20:]
        await asyncio.to_thread(
            lambda: asyncio.run_coroutine_threadsafe(told.wait(), loop).result(10)
        )
        yield b"".join(LINES[2:])

    def on_node(node: NodeLine) -> None:
        seen.append(node.key)
        if node.key == "0":
            told.set()

    server = fake(lambda i: StreamingResponse(body(), media_type="application/x-ndjson"))
    async with AsyncClient(server.url) as client:
        assert await client.rollout_tree(REQUEST, on_node=on_node) == TREE
    assert seen == ["", "0", "1"]
    assert server.headers[0]["accept"] == "application/x-ndjson, application/json;q=0.5"


@pytest.mark.parametrize(
    "broken",
    [
        lambda: streamed(*LINES[:2]),
        lambda: streamed(*LINES[:2], b'{"kind": "no'),
        lambda: streamed(*LINES[:2], then=lambda: 1 / 0),  # type: ignore[arg-type, return-value]
        lambda: streamed(LINES[0], error_line(503)),
    ],
    ids=["ends early", "damaged", "dies", "an error at the end"],
)
async def test_a_stream_that_breaks_moves_to_another_server(
    fake: Fake, broken: Callable[[], StreamingResponse]
) -> None:
    seen: list[str] = []
    bad, good = fake(lambda i: broken()), fake(lambda i: streamed(*LINES))
    async with AsyncClient([bad.url, good.url], affinity_slack=9, timeout_s=10) as client:
        for i in range(30):
            seen.clear()
            answer = await client.rollout_tree(
                asking(f"question {i}"), on_node=lambda node: seen.append(node.key)
            )
            assert answer == TREE
            if bad.bodies:
                break
    assert seen[:1] == [""]
    assert seen[-3:] == ["", "0", "1"]
    assert len(seen) > 3


async def test_a_stream_that_ends_in_a_refusal_is_raised(fake: Fake) -> None:
    server = fake(lambda i: streamed(LINES[0], error_line(413, "plan")))
    async with AsyncClient(server.url) as client:
        with pytest.raises(RequestError, match="plan: no") as caught:
            await client.rollout_tree(REQUEST, on_node=lambda node: None)
    assert (caught.value.status, len(server.bodies)) == (413, 1)


def error_line(status: int, field: str | None = None) -> bytes:
    found = Problem(title="t", status=status, detail="no", field=field)
    return stream.dump(stream.ErrorLine(problem=found)).encode()
