"""The typed client, both faces, over real sockets.

1. A refusal that passes is retried as the server says, by the same id and body, within the bound.
2. A server that dies, refuses or is stale costs no tree: another one gets it.
3. What another attempt cannot mend is raised at once, with field and remedy.
4. A question stays with its server; connections are reused.
5. Whoever gives up, by cancelling, Ctrl-C or an error of its own, has cancelled the request at the server.
6. The token is sent to the servers and written nowhere.

`FakeServer` answers as scripted; the last tests ask real servers of a real model.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_rollouts import ANSWER, FakeServer, dies_mid_answer, problem
from fastapi.responses import PlainTextResponse, RedirectResponse, StreamingResponse
from support import free_port, running_server

from shared.errors import ConfigError, FleetError, RequestError
from shared.tree import Node
from shared.wire import GroupPlan, RolloutTreeRequest, RolloutTreeResponse, Sampling, TreePlan
from trainer.client import AsyncClient, Client
from trainer.client.connection import open_http

ROOT = Path(__file__).resolve().parents[2]
REQUEST = RolloutTreeRequest(request_id="r", prompt="1", plan=GroupPlan(samples=1))
Fake = Callable[[Callable[[int], Any]], FakeServer]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(FakeServer(script).running())


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOKE_TOKEN", raising=False)


def asking(prompt: str) -> RolloutTreeRequest:
    return REQUEST.model_copy(update={"prompt": prompt, "request_id": None})


# 1. Retries


def in_a_second() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("wait", "at_least"), [(lambda: "1", 1.0), (in_a_second, 0.9)], ids=["seconds", "date"]
)
async def test_a_refusal_is_waited_out_as_the_server_says(
    fake: Fake, status: int, wait: Callable[[], str], at_least: float
) -> None:
    server = fake(lambda i: ANSWER if i else problem(status, **{"Retry-After": wait()}))
    async with AsyncClient(server.url, timeout_s=10) as client:
        started = time.monotonic()
        await client.rollout_tree(REQUEST)
        assert at_least <= time.monotonic() - started < at_least + 2
    assert server.ids == ["r", "r"]


@pytest.mark.parametrize("status", [500, 502, 504])
async def test_failures_are_tried_again_further_and_further_apart(fake: Fake, status: int) -> None:
    at: list[float] = []

    def script(i: int) -> Any:
        at.append(time.monotonic())
        return ANSWER if i == 3 else problem(status)

    async with AsyncClient(fake(script).url, timeout_s=10) as client:
        await client.rollout_tree(REQUEST)
    waits = [after - before for before, after in pairwise(at)]
    assert [wait >= least for wait, least in zip(waits, (0.2, 0.4, 0.8), strict=True)] == [True] * 3
    assert sum(waits) < 3


async def test_every_attempt_asks_for_the_same_tree(fake: Fake) -> None:
    server = fake(lambda i: ANSWER if i % 2 else problem(503, **{"Retry-After": "0"}))
    async with AsyncClient(server.url, timeout_s=10) as client:
        for _ in range(2):
            await client.rollout_tree(asking("1"))
        await client.rollout_tree(REQUEST)
    first, again, other, *_ = server.bodies
    assert first == again
    assert len(first["request_id"]) == 32
    assert first["sampling"]["seed"] is not None
    assert other["request_id"] != first["request_id"]
    assert other["sampling"]["seed"] != first["sampling"]["seed"]
    assert server.bodies[-1]["request_id"] == "r"


async def test_a_seed_of_ones_own_is_kept(fake: Fake) -> None:
    server = fake(lambda i: ANSWER)
    async with AsyncClient(server.url) as client:
        await client.rollout_tree(REQUEST.model_copy(update={"sampling": Sampling(seed=7)}))
    assert server.bodies[0]["sampling"]["seed"] == 7


@pytest.mark.parametrize("retry_after", ["3600", "1"])
async def test_the_bound_holds_whatever_the_server_says(fake: Fake, retry_after: str) -> None:
    server = fake(lambda i: problem(429, **{"Retry-After": retry_after}))
    async with AsyncClient(server.url, timeout_s=0.5) as client:
        started = time.monotonic()
        with pytest.raises(FleetError, match=r"no tree within 0.5 s.*429: None: no"):
            await client.rollout_tree(REQUEST)
        assert time.monotonic() - started < 2


async def test_an_answer_that_dribbles_is_given_up_at_the_bound(fake: Fake) -> None:
    """A bound on each read would never be reached."""

    async def drops() -> Any:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    server = fake(lambda i: StreamingResponse(drops(), media_type="application/json"))
    async with AsyncClient(server.url, timeout_s=0.5) as client:
        with pytest.raises(FleetError, match="no whole answer"):
            await client.rollout_tree(REQUEST)


# 2. Failover


@pytest.mark.parametrize(
    "refusal",
    [
        lambda i: problem(503, **{"Retry-After": "60"}),
        lambda i: problem(429, **{"Retry-After": "60"}),
        lambda i: problem(500),
        lambda i: problem(409, "min_weight_version"),
        lambda i: dies_mid_answer(),
        lambda i: PlainTextResponse("<html>a proxy's page</html>"),
    ],
    ids=["503", "429", "500", "stale", "dies mid-answer", "no tree"],
)
async def test_a_tree_moves_to_another_server_at_once(
    fake: Fake, refusal: Callable[[int], Any]
) -> None:
    bad, good = fake(refusal), fake(lambda i: ANSWER)
    async with AsyncClient([bad.url, good.url], timeout_s=10) as client:
        started = time.monotonic()
        answers = [await client.rollout_tree(asking(f"question {i}")) for i in range(8)]
        assert time.monotonic() - started < 2
    assert len(answers) == len(good.bodies) == 8
    assert bad.bodies, "some question has the bad server as its own"


async def test_a_refusing_server_is_left_alone_by_other_requests(fake: Fake) -> None:
    full = fake(lambda i: problem(429, **{"Retry-After": "60"}))
    good = fake(lambda i: ANSWER)
    async with AsyncClient([full.url, good.url], timeout_s=10) as client:
        for i in range(20):
            await client.rollout_tree(asking(f"question {i}"))
    assert (len(full.bodies), len(good.bodies)) == (1, 20)


async def test_a_request_that_one_server_cannot_do_takes_it_from_no_other(fake: Fake) -> None:
    """A 500 may be of the request's own making."""
    bad, good = fake(lambda i: problem(500)), fake(lambda i: ANSWER)
    async with AsyncClient([bad.url, good.url], timeout_s=10) as client:
        for i in range(20):
            await client.rollout_tree(asking(f"question {i}"))
    assert len(bad.bodies) > 4


async def test_nobody_listens_at_one_address(fake: Fake) -> None:
    good = fake(lambda i: ANSWER)
    async with AsyncClient([f"http://127.0.0.1:{free_port()}", good.url], timeout_s=10) as client:
        for i in range(8):
            await client.rollout_tree(asking(f"question {i}"))


# 3. What is raised


@pytest.mark.parametrize("status", [400, 404, 406, 409, 413, 422])
async def test_a_bad_request_is_raised_at_once(fake: Fake, status: int) -> None:
    server = fake(lambda i: problem(status, "reward.name"))
    async with AsyncClient([server.url, fake(lambda i: ANSWER).url]) as client:
        refused = None
        for i in range(20):
            try:
                await client.rollout_tree(asking(f"question {i}"))
            except RequestError as error:
                refused = error
                break
    assert refused is not None
    assert str(refused) == "reward.name: no"
    assert (refused.field, refused.detail, refused.status) == ("reward.name", "no", status)
    assert len(server.bodies) == 1


async def test_a_redirect_is_not_followed(fake: Fake) -> None:
    """It would carry question and token to wherever it points."""
    server = fake(lambda i: RedirectResponse("http://elsewhere.example/"))
    async with AsyncClient(server.url) as client:
        with pytest.raises(RequestError) as caught:
            await client.rollout_tree(REQUEST)
    assert caught.value.status == 307


@pytest.mark.parametrize("status", [401, 403])
async def test_a_token_that_is_not_taken_is_named(fake: Fake, status: int) -> None:
    server = fake(lambda i: problem(status))
    async with AsyncClient(server.url, token="sesame") as client:
        with pytest.raises(ConfigError, match=f"^{server.url} .*SPOKE_TOKEN") as caught:
            await client.rollout_tree(REQUEST)
    assert "sesame" not in str(caught.value)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("servers", "says"),
    [
        ("127.0.0.1:8000", "write a URL"),
        ("ftp://a", "write a URL"),
        ([], "at least one"),
        ("http://me:sesame@host", "out of its URL"),
    ],
)
def test_servers_that_cannot_be(servers: Any, says: str) -> None:
    for face in (AsyncClient, Client):
        with pytest.raises(ConfigError, match=says) as caught:
            face(servers)
        assert "sesame" not in str(caught.value)


# 4. Affinity and connections


async def test_a_question_stays_with_its_server_whatever_its_plan(fake: Fake) -> None:
    servers = [fake(lambda i: ANSWER) for _ in range(3)]
    async with AsyncClient([server.url for server in servers]) as client:
        for samples in range(1, 9):
            await client.rollout_tree(
                asking("1").model_copy(update={"plan": GroupPlan(samples=samples)})
            )
        assert sorted(len(server.bodies) for server in servers) == [0, 0, 8]
        for i in range(40):
            await client.rollout_tree(asking(f"question {i}"))
    assert all(len(server.bodies) > 4 for server in servers)


async def test_many_trees_in_a_row_take_one_connection_and_many_at_once_as_many(fake: Fake) -> None:
    server = fake(lambda i: ANSWER)
    async with AsyncClient(server.url, concurrency=4) as client:
        for _ in range(10):
            await client.rollout_tree(REQUEST)
        assert len(server.connections) == 1
        for _ in range(3):
            await asyncio.gather(*(client.rollout_tree(REQUEST) for _ in range(12)))
        assert len(server.connections) <= 4
    assert len(server.bodies) == 46


async def test_the_system_watches_the_connections(fake: Fake) -> None:
    """A machine that is gone without a word is noticed before the bound."""
    made: list[socket.socket] = []

    async def trace(event: str, details: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            made.append(details["return_value"].get_extra_info("socket"))

    async with open_http(None, 1) as http:
        await http.get(f"{fake(lambda i: ANSWER).url}/readyz", extensions={"trace": trace})
        assert made[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# 5. Giving up


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
            assert (place, type(answer)) == (0, RolloutTreeResponse)
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


# Both faces


def test_the_face_without_a_loop_does_the_same(fake: Fake) -> None:
    server = fake(lambda i: ANSWER if i else problem(503, **{"Retry-After": "0"}))
    seen: list[tuple[int, int]] = []
    here = threading.get_ident()

    def on_node(node: Node) -> None:
        seen.append((node.id, threading.get_ident()))

    with Client([server.url], timeout_s=10) as client:
        assert client.rollout_tree(REQUEST, on_node=on_node).server_id == "s"
        assert client.ready() == [server.url]
        assert client.info() == client.info(server.url) == {"server_id": "fake"}
        with pytest.raises(FleetError, match="ConnectError"):
            client.info(f"http://127.0.0.1:{free_port()}")
    assert seen == [(0, here), (1, here)]
    with pytest.raises(RuntimeError):
        client.rollout_tree(REQUEST)


def test_an_error_in_a_callback_comes_out(fake: Fake) -> None:
    def on_node(node: Node) -> None:
        raise TimeoutError("mine")

    server = fake(lambda i: ANSWER)
    with Client(server.url) as client, pytest.raises(TimeoutError, match="mine"):
        client.rollout_tree(REQUEST, on_node=on_node)
    assert len(server.bodies) == 1


async def test_an_error_in_a_callback_is_not_taken_for_a_servers(fake: Fake) -> None:
    def on_node(node: Node) -> None:
        raise TimeoutError("mine")

    server = fake(lambda i: ANSWER)
    async with AsyncClient(server.url) as client:
        with pytest.raises(TimeoutError, match="mine"):
            await client.rollout_tree(REQUEST, on_node=on_node)
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


# 6. The token


@pytest.mark.parametrize("given", ["argument", "environment"])
async def test_the_token_is_sent_and_written_nowhere(
    fake: Fake, given: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SPOKE_TOKEN", "sesame\n" if given == "environment" else "wrong")
    server = fake(lambda i: problem(503, **{"Retry-After": "0"}))
    async with AsyncClient(
        server.url, token="sesame" if given == "argument" else None, timeout_s=0.3
    ) as client:
        with pytest.raises(FleetError) as caught:
            await client.rollout_tree(REQUEST)
        assert server.headers[0]["authorization"] == "Bearer sesame"
        written = caplog.text + repr(client) + repr(vars(client)) + repr(caught.value)
        assert "sesame" not in written


@pytest.mark.parametrize("token", ["open sesame", "sésame", "ses\name"])
def test_a_token_that_no_header_can_carry(token: str) -> None:
    with pytest.raises(ConfigError, match="SPOKE_TOKEN") as caught:
        AsyncClient("http://127.0.0.1:1", token=token)
    assert token not in str(caught.value)


async def test_without_a_token_no_header_is_sent(fake: Fake) -> None:
    server = fake(lambda i: ANSWER)
    async with AsyncClient(server.url) as client:
        await client.rollout_tree(REQUEST)
    assert "authorization" not in server.headers[0]


def test_importing_the_client_takes_little() -> None:
    code = (
        "import sys, trainer.client\n"
        "heavy = ('torch', 'vllm', 'fastapi', 'transformers', 'datasets', 'tokenizers', 'redis', 'fsspec')\n"
        "print([m for m in heavy if m in sys.modules])\n"
        "print([m for m in sys.modules if m.startswith('trainer.') and not m.startswith('trainer.client')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["[]", "[]"]


# Real servers


def test_a_server_killed_mid_tree_costs_no_tree(tiny_math: Path, tmp_path: Path) -> None:
    engine = ("--engine", "transformers", "--dtype", "float32")
    request = RolloutTreeRequest(
        request_id="long",
        prompt="Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
        plan=TreePlan(branch_factors=[8, 8, 8], segment_tokens=8),
        sampling=Sampling(max_tokens=160),
    )
    with ExitStack() as stack:
        servers = {
            server.url: server
            for server in (
                stack.enter_context(running_server(tiny_math, tmp_path / f"{i}.log", *engine))
                for i in range(2)
            )
        }
        client = stack.enter_context(Client(servers, timeout_s=120))
        assert sorted(client.ready()) == sorted(servers)
        quick = request.model_copy(update={"request_id": "q", "plan": GroupPlan(samples=1)})
        own = client.rollout_tree(quick).server_id
        mine = next(url for url in servers if client.info(url)["server_id"] == own)
        killed = threading.Event()

        def kill() -> None:
            servers[mine].process.kill()
            killed.set()

        timer = threading.Timer(0.5, kill)
        timer.start()
        answer = client.rollout_tree(request)
        assert killed.is_set(), "the tree was there before the kill: make it larger"
        assert answer.request_id == "long"
        assert answer.server_id != own
        # The same id at the server that stands: the same tree, not sampled again.
        assert client.rollout_tree(request) == answer
        assert client.ready() == [url for url in servers if url != mine]
