"""Both faces of the client do the same, and whoever gives up has cancelled the request at the server."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest
from fake_rollouts import ANSWER, REQUEST, Fake, asking, problem
from fastapi.responses import Response
from support import free_port

from shared import stream
from shared.errors import ConfigError, FleetError, RequestError, TreeError, TreeTooLargeError
from shared.wire import (
    RolloutTreeRequest,
    RolloutTreeResponse,
)
from trainer.client import AsyncClient, Client, NodeLine


def test_the_face_without_a_loop_does_the_same(fake: Fake) -> None:
    server = fake(lambda i: ANSWER if i else problem(503, **{"Retry-After": "0"}))
    seen: list[tuple[str, int]] = []
    here = threading.get_ident()

    def on_node(node: NodeLine) -> None:
        seen.append((node.key, threading.get_ident()))

    with Client([server.url], timeout_s=10) as client:
        assert client.rollout_tree(REQUEST, on_node=on_node).server_id == "s"
        assert client.ready() == [server.url]
        assert client.info() == client.info(server.url) == {"server_id": "fake"}
        with pytest.raises(FleetError, match="ConnectError"):
            client.info(f"http://127.0.0.1:{free_port()}")
    assert seen == [("", here), ("0", here)]
    with pytest.raises(RuntimeError):
        client.rollout_tree(REQUEST)


def test_an_error_in_a_callback_comes_out(fake: Fake) -> None:
    def on_node(node: NodeLine) -> None:
        raise TimeoutError("mine")

    server = fake(lambda i: ANSWER)
    with Client(server.url) as client, pytest.raises(TimeoutError, match="mine"):
        client.rollout_tree(REQUEST, on_node=on_node)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "mine",
    [
        TimeoutError,
        httpx.ReadError,
        httpx.DecodingError,
        httpx.InvalidURL,
        TreeError,
        TreeTooLargeError,
    ],
)
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_an_error_in_a_callback_is_not_taken_for_a_servers(
    fake: Fake, mine: type[Exception], streams: bool
) -> None:
    raised = mine("mine")

    def on_node(node: NodeLine) -> None:
        raise raised

    tree = RolloutTreeResponse.model_validate(ANSWER)
    server = fake(
        lambda i: (
            Response("".join(stream.lines(tree)), media_type="application/x-ndjson")
            if streams
            else ANSWER
        )
    )
    async with AsyncClient(server.url, timeout_s=5) as client:
        with pytest.raises(mine, match="mine") as caught:
            await client.rollout_tree(REQUEST, on_node=on_node)
    assert caught.value is raised
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert len(server.bodies) == 1


def test_many_trees_come_as_they_finish_and_a_refusal_loses_no_other(fake: Fake) -> None:
    server = fake(lambda i: problem(422, "prompt") if i == 2 else ANSWER)
    taken: list[int] = []

    def requests() -> Iterator[RolloutTreeRequest]:
        for i in range(6):
            taken.append(i)
            yield asking(f"question {i}")

    with Client(server.url) as client:
        found = {}
        for place, answer in client.rollout_trees(requests(), concurrency=1):
            found[place] = answer
            assert (
                len(taken) <= len(found) + 1
            )  # read as they are sent, so that a data set need not fit the memory
    assert [type(found[i]) for i in range(6)] == [
        RequestError if i == 2 else RolloutTreeResponse for i in range(6)
    ]


async def test_a_fleet_that_fails_ends_every_tree(fake: Fake) -> None:
    server = fake(lambda i: problem(401) if i == 1 else server.stall())
    async with AsyncClient(server.url) as client:
        with pytest.raises(ConfigError):
            async for _ in client.rollout_trees([REQUEST] * 2):
                pass
        assert await asyncio.to_thread(server.left.wait, 5)


async def test_info_and_ready_of_servers_that_are_not(fake: Fake) -> None:
    nobody, server = f"http://127.0.0.1:{free_port()}", fake(lambda i: ANSWER)
    async with AsyncClient([nobody, server.url]) as client:
        assert await client.ready() == [server.url]
        assert await client.info() == {"server_id": "fake"}
    async with AsyncClient(nobody) as client:
        assert await client.ready() == []
        with pytest.raises(FleetError, match="ConnectError"):
            await client.info()


# Giving up: by cancelling, Ctrl-C, or leaving a loop


async def test_cancelling_cancels_at_the_server(fake: Fake) -> None:
    server = fake(lambda i: server.stall())
    async with AsyncClient(server.url) as client:
        task = asyncio.create_task(client.rollout_tree(REQUEST))
        assert await asyncio.to_thread(server.asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.left.wait, 5)


def test_ctrl_c_cancels_at_the_server_and_the_client_goes_on(fake: Fake) -> None:
    server = fake(lambda i: ANSWER if i else server.stall())

    def interrupt() -> None:
        server.asked.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    with Client(server.url) as client:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            client.rollout_tree(REQUEST)
        assert server.left.wait(5)
        assert client.rollout_tree(REQUEST).request_id == "r"


def test_a_loop_that_is_left_cancels_what_is_in_flight(fake: Fake) -> None:
    server = fake(lambda i: server.stall() if i else ANSWER)
    with Client(server.url) as client:
        for place, answer in client.rollout_trees([REQUEST] * 50, concurrency=2):
            assert place in (0, 1)  # both are sent; whichever comes first is answered
            assert isinstance(answer, RolloutTreeResponse)
            break
        assert server.left.wait(5)
    assert len(server.bodies) <= 3


def test_ctrl_c_in_a_loop_cancels_what_is_in_flight(fake: Fake) -> None:
    server = fake(lambda i: server.stall())

    def interrupt() -> None:
        server.asked.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    with Client(server.url) as client:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            list(client.rollout_trees([REQUEST] * 5, concurrency=2))
        assert server.left.wait(5)
