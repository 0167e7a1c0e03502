"""The typed client over real sockets: what is retried, where, and what is raised.

1. A refusal that passes is retried as the server says, by the same id and body, within the bound.
2. A server that dies, refuses or is stale costs no tree: another one gets it.
3. What another attempt cannot mend is raised at once, with field and remedy.
4. A question stays with its server; connections are reused.
5. The token is sent to the servers and written nowhere.

`FakeServer` answers as scripted; real servers are asked in `tests/integration/test_client_servers.py`.
"""

import asyncio
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_rollouts import ANSWER, REQUEST, Fake, asking, dies_mid_answer, problem
from fastapi.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from support import free_port

from shared.errors import ConfigError, FleetError, RequestError
from shared.retry_after import retry_after_s
from shared.wire import (
    GroupPlan,
    Sampling,
)
from trainer.client import AsyncClient, Client, Target, fixed
from trainer.client.connection import open_http

ROOT = Path(__file__).resolve().parents[2]


# 1. Retries


def in_two_seconds() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("wait", "at_least"), [(lambda: "1", 1.0), (in_two_seconds, 0.9)], ids=["seconds", "date"]
)
async def test_a_refusal_is_waited_out_as_the_server_says(
    fake: Fake, status: int, wait: Callable[[], str], at_least: float
) -> None:
    server = fake(lambda i: ANSWER if i else problem(status, **{"Retry-After": wait()}))
    async with AsyncClient(server.url, timeout_s=10) as client:
        started = time.monotonic()
        await client.rollout_tree(REQUEST)
        assert time.monotonic() - started >= at_least
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


async def test_every_attempt_asks_for_the_same_tree(fake: Fake) -> None:
    server = fake(lambda i: ANSWER if i % 2 else problem(503, **{"Retry-After": "0"}))
    async with AsyncClient(server.url, timeout_s=10, reproducible=True) as client:
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


async def test_a_seed_of_ones_own_is_kept_and_none_is_made_up(fake: Fake) -> None:
    server = fake(lambda i: ANSWER)
    async with AsyncClient(server.url) as client:
        await client.rollout_tree(REQUEST.model_copy(update={"sampling": Sampling(seed=7)}))
        await client.rollout_tree(asking("1"))
    assert server.bodies[0]["sampling"]["seed"] == 7
    assert "seed" not in server.bodies[1]["sampling"]


@pytest.mark.parametrize("retry_after", ["3600", "1"])
async def test_the_bound_holds_whatever_the_server_says(fake: Fake, retry_after: str) -> None:
    server = fake(lambda i: problem(429, **{"Retry-After": retry_after}))
    async with AsyncClient(server.url, timeout_s=0.5) as client:
        started = time.monotonic()
        with pytest.raises(FleetError, match=r"no tree within 0.5 s.*429: None: no"):
            await client.rollout_tree(REQUEST)
        assert time.monotonic() - started < 5


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


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("says", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"], ids=["zero", "past"])
async def test_a_retry_after_of_nothing_is_no_leave_to_hammer(
    fake: Fake, status: int, says: str
) -> None:
    server = fake(lambda i: problem(status, **{"Retry-After": says}))
    async with AsyncClient(server.url, timeout_s=1) as client:
        with pytest.raises(FleetError):
            await client.rollout_tree(REQUEST)
    assert 2 <= len(server.bodies) <= 3  # at 0, 0.2 and 0.6 s at the earliest


@pytest.mark.parametrize(
    "date", [f"Wed, 21 Oct {'9' * 23} 07:28:00 GMT", f"Wed, 21 Oct 2026 07:28:00 +{'9' * 20}"]
)
async def test_a_date_that_no_clock_can_hold_is_none(fake: Fake, date: str) -> None:
    server = fake(lambda i: ANSWER if i else problem(503, **{"Retry-After": date}))
    async with AsyncClient(server.url, timeout_s=10) as client:
        await client.rollout_tree(REQUEST)
    assert len(server.bodies) == 2
    past = "Thu, 01 Jan 1970 00:00:30 GMT"
    assert retry_after_s(past, now=10.0, date=date) == 20.0


# 2. Failover


@pytest.mark.parametrize(
    "refusal",
    [
        lambda i: problem(503, **{"Retry-After": "60"}),
        lambda i: problem(429, **{"Retry-After": "60"}),
        lambda i: problem(500),
        lambda i: problem(408, "body"),
        lambda i: Response(b"no gzip", headers={"Content-Encoding": "gzip"}),
        lambda i: problem(409, "min_weight_version"),
        lambda i: dies_mid_answer(),
        lambda i: PlainTextResponse("<html>a proxy's page</html>"),
    ],
    ids=["503", "429", "500", "408", "no gzip", "stale", "dies mid-answer", "no tree"],
)
async def test_a_tree_moves_to_another_server_at_once(
    fake: Fake, refusal: Callable[[int], Any]
) -> None:
    bad, good = fake(refusal), fake(lambda i: ANSWER)
    async with AsyncClient([bad.url, good.url], timeout_s=30) as client:
        started = time.monotonic()
        answers = [await client.rollout_tree(asking(f"question {i}")) for i in range(8)]
        assert time.monotonic() - started < 10
    assert len(answers) == len(good.bodies) == 8
    assert bad.bodies, "some question has the bad server as its own"


async def test_a_refusing_server_is_left_alone_by_other_requests(fake: Fake) -> None:
    full = fake(lambda i: problem(429, **{"Retry-After": "60"}))
    good = fake(lambda i: ANSWER)
    async with AsyncClient([full.url, good.url], timeout_s=10) as client:
        for i in range(20):
            await client.rollout_tree(asking(f"question {i}"))
    assert (len(full.bodies), len(good.bodies)) == (1, 20)


async def test_a_full_server_gets_the_next_tree_as_soon_as_one_of_ours_ends(fake: Fake) -> None:
    """Not only after its Retry-After: it would stand idle."""
    gate = threading.Event()

    async def slow() -> Any:
        await asyncio.to_thread(gate.wait, 10)
        return ANSWER

    server = fake(
        lambda i: slow() if i == 0 else problem(429, **{"Retry-After": "60"}) if i == 1 else ANSWER
    )
    async with AsyncClient(server.url, timeout_s=30) as client, asyncio.timeout(20):
        first = asyncio.create_task(client.rollout_tree(REQUEST))
        await asyncio.to_thread(server.asked.wait, 10)
        refused = asyncio.create_task(client.rollout_tree(REQUEST))
        while len(server.bodies) < 2:
            await asyncio.sleep(0.01)
        gate.set()
        await first
        await client.rollout_tree(REQUEST)
        refused.cancel()
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    "answer",
    [
        lambda i: problem(500),
        lambda i: Response(b"no gzip", headers={"Content-Encoding": "gzip"}),
    ],
    ids=["500", "no gzip"],
)
async def test_a_request_that_one_server_cannot_do_takes_it_from_no_other(
    fake: Fake, answer: Callable[[int], Any]
) -> None:
    """A 500 may be of the request's own making."""
    bad, good = fake(answer), fake(lambda i: ANSWER)
    async with AsyncClient([bad.url, good.url], timeout_s=10) as client:
        for i in range(20):
            await client.rollout_tree(asking(f"question {i}"))
    assert len(bad.bodies) > 4


async def test_nobody_listens_at_one_address(fake: Fake) -> None:
    good = fake(lambda i: ANSWER)
    async with AsyncClient([f"http://127.0.0.1:{free_port()}", good.url], timeout_s=10) as client:
        for i in range(8):
            await client.rollout_tree(asking(f"question {i}"))


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://a:b", "http://127.0.0.1:99999", "http://a\x00b", "nowhere"],
)
async def test_a_server_whose_listed_url_is_none_costs_no_tree(fake: Fake, url: str) -> None:
    """A record of the fleet is what some server wrote of itself."""
    good = fake(lambda i: ANSWER)

    async def listed() -> list[Target]:
        return [Target(url=url), Target(url=good.url, load=1)]

    async with AsyncClient(listed, affinity_slack=0, timeout_s=10) as client:
        await client.rollout_tree(REQUEST)
        assert await client.ready() == [good.url]
        assert await client.info() == {"server_id": "fake"}
    async with AsyncClient(fixed(url), timeout_s=0.3) as client:
        with pytest.raises(FleetError, match=r"the last reason: .*: \w+: "):
            await client.rollout_tree(REQUEST)


async def test_a_list_that_hangs_holds_up_no_tree(fake: Fake) -> None:
    """As one from a Redis that was stopped: each call takes its whole bound."""
    server = fake(lambda i: ANSWER)
    calls, hung = 0, asyncio.Event()

    async def listed() -> list[Target]:
        nonlocal calls
        calls += 1
        if hung.is_set():
            await asyncio.Event().wait()
        return [Target(url=server.url)]

    async with AsyncClient(listed, timeout_s=30) as client:
        # Many at once, with no server known: one call for all of them.
        await asyncio.gather(*(client.rollout_tree(asking(f"question {i}")) for i in range(8)))
        assert calls == 1
        hung.set()
        client._listing.expire()
        async with asyncio.timeout(10):
            for i in range(20):
                await client.rollout_tree(asking(f"question {i}"))
    assert (calls, len(server.bodies)) == (2, 28)


async def test_a_list_that_hangs_is_given_up_at_the_bound() -> None:
    async def listed() -> list[Target]:
        await asyncio.Event().wait()
        return []

    async with AsyncClient(listed, timeout_s=0.3) as client, asyncio.timeout(10):
        with pytest.raises(FleetError, match="no live server"):
            await client.rollout_tree(REQUEST)


async def test_what_else_a_list_raises_is_raised() -> None:
    async def listed() -> list[Target]:
        raise ValueError("of the caller's making")

    async with AsyncClient(listed, timeout_s=10) as client:
        with pytest.raises(ValueError, match="making"):
            await client.rollout_tree(REQUEST)


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
        ("http://[::1", "number 1 .*write a URL"),
        (["http://a", "http://me:se/same@host"], "number 2 .*write a URL"),
        ("http://127.0.0.1:99999", "write a URL"),
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


# 5. The token


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
