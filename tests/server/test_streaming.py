"""What becomes of a stream's tree when its reader goes away at an awkward moment."""

import asyncio
from typing import Any

import pytest
import zstandard
from starlette.requests import Request

from server.branches import Branch
from server.engines.base import Completion
from server.service import Teller
from server.status import Status
from server.streaming import compressed, node_stream
from shared.tree import FinishReason
from shared.wire import GroupPlan, RolloutTreeRequest, RolloutTreeResponse

BODY = RolloutTreeRequest(prompt="1+1=", plan=GroupPlan(samples=2), return_text=False)
SCOPE: dict[str, Any] = {"type": "http", "headers": [], "asgi": {"spec_version": "2.3"}}
TIMEOUT = 10.0


class FakeService:
    """Tells of one node and then samples for ever; notes when it is given up."""

    def __init__(self) -> None:
        self.status = Status(server_id="fake")
        self.given_up = asyncio.Event()

    async def rollout_tree(
        self, request: RolloutTreeRequest, tell: Teller, *, caller: str
    ) -> RolloutTreeResponse:
        done = Completion(
            token_ids=[5], logprobs=[-1.0], versions=[(0, 1)], finish_reason=FinishReason.STOP
        )
        tell.node((0,), Branch(completion=done, response=(5,)))
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up.set()
        raise AssertionError("it samples for ever")


@pytest.mark.parametrize("when", ["before the first line", "while a line is being sent"])
async def test_a_reader_that_goes_away_gives_the_tree_up(when: str) -> None:
    service, gone, sending = FakeService(), asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await asyncio.Event().wait()  # a reader that reads nothing

    stream: Any = await node_stream(Request(SCOPE, receive), service, BODY)  # type: ignore[arg-type]
    # Its handler is over and its first line not sent: a drain must not take this for nobody.
    assert service.status.in_flight == 1
    if when == "before the first line":
        gone.set()
    sent = asyncio.create_task(stream(SCOPE, receive, send))
    if not gone.is_set():
        await asyncio.wait_for(sending.wait(), TIMEOUT)
        gone.set()
    await asyncio.wait_for(sent, TIMEOUT)
    assert service.given_up.is_set()
    assert service.status.in_flight == 0
    del stream, sent
    ours = asyncio.current_task()
    async with asyncio.timeout(TIMEOUT):
        while asyncio.all_tasks() != {ours}:
            await asyncio.sleep(0)


async def test_a_compressed_piece_can_be_read_before_the_next_one_is_there() -> None:
    async def pieces() -> Any:
        for piece in ("one\n", "two\n"):
            yield piece

    frame, read = zstandard.ZstdDecompressor().decompressobj(), []
    async for packed in compressed(pieces()):
        read.append(frame.decompress(packed).decode())
    assert read == ["one\n", "two\n", ""]
    assert frame.eof
