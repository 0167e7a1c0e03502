"""HTTP rewards against a real server over a real socket: whatever it does costs leaves, never the tree."""

import asyncio
import gzip
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from support import free_port

from server.rewards import Grade, RewardPool
from server.rewards import http as http_module
from server.rewards.limits import HttpLimits
from shared.errors import ConfigError, RequestError

TOKEN = "s3cret-of-the-judge"
GOOD = Grade(reward=1.0)
ROOT = Path(__file__).resolve().parents[2]


class Judge:
    """A reward server that does what `reference` says and keeps what it was asked."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.asked: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.app.add_api_route("/grade", self.grade, methods=["POST"])
        self.app.add_api_route("/elsewhere", self.elsewhere, methods=["POST"])

    async def elsewhere(self) -> dict[str, Any]:
        return {"rewards": [1.0]}

    async def grade(self, request: Request) -> Response:
        asked = await request.json()
        self.asked.append(asked)
        self.authorization.append(request.headers.get("Authorization"))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            while asked["reference"] == "hang" and not await request.is_disconnected():
                await asyncio.sleep(0.01)
            return await self.answer(asked, asked["responses"])
        finally:
            self.at_once -= 1

    async def answer(self, asked: dict[str, Any], responses: list[str]) -> Response:
        first = len([one for one in self.asked if one == asked]) == 1
        right = JSONResponse({"rewards": [1.0] * len(responses)})
        match asked["reference"].split():
            case ["lengths"]:
                return JSONResponse({"rewards": [len(response) for response in responses]})
            case ["busy", status, *after] if first:
                headers = {"Retry-After": " ".join(after)}
                return Response(status_code=int(status), headers=headers)
            case ["status", status]:
                return JSONResponse({"detail": f"no, {TOKEN}"}, status_code=int(status))
            case ["field", field]:
                return JSONResponse({"field": field, "detail": f"not {TOKEN}"}, status_code=422)
            case ["redirect"]:
                return RedirectResponse("/elsewhere", status_code=307)
            case ["raw", *words]:
                return Response(" ".join(words), media_type="application/json")
            case ["zip"]:
                return Response(gzip.compress(right.body), headers={"Content-Encoding": "gzip"})
            case ["long"]:
                return Response(b" " * (2 << 20))
            case ["slow"]:
                await asyncio.sleep(0.05)
        return right


@pytest.fixture(scope="module")
def judge() -> Iterator[tuple[Judge, str]]:
    judge = Judge()
    with served(judge.app) as url:
        yield judge, f"{url}/grade"


class served:
    """An application on a real uvicorn in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self.port = free_port()
        config = uvicorn.Config(
            app, port=self.port, log_level="warning", timeout_graceful_shutdown=1, lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> str:
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture
async def pool(judge, monkeypatch):
    monkeypatch.setenv("SPOKE_REWARD_TOKEN_MY_JUDGE", TOKEN)
    http = HttpLimits(batch=4, connections=2, timeout_s=0.5, attempts=3, retry_s=2.0)
    pool = RewardPool({"my-judge": judge[1]}, http=http)
    await pool.start(["my-judge"])
    yield pool
    await pool.close()


async def grade(pool: RewardPool, reference: str, *responses: str) -> list[Grade]:
    grades = await pool.grade("my-judge", responses or ("a", "b"), reference, {})
    assert not any(TOKEN in (one.error or "") for one in grades)
    return grades


async def test_leaves_go_out_in_batches_and_come_back_in_order(pool, judge):
    judge, _ = judge
    judge.asked.clear()
    responses = ["x" * n for n in range(10)] + ["xxx"]
    grades = await pool.grade("my-judge", responses, "lengths", {"unfinished": -1.0})
    assert grades == [Grade(reward=float(len(response))) for response in responses]
    assert [len(asked["responses"]) for asked in judge.asked].count(4) == 2
    assert sum(len(asked["responses"]) for asked in judge.asked) == 10
    assert {k: v for k, v in judge.asked[0].items() if k != "responses"} == {
        "reward": "my-judge", "reference": "lengths", "options": {"unfinished": -1.0},
    }  # fmt: skip
    assert set(judge.authorization) == {f"Bearer {TOKEN}"}


async def test_connections_are_bounded(pool, judge):
    judge, _ = judge
    judge.most_at_once = 0
    grades = await asyncio.gather(*(grade(pool, "slow", *map(str, range(12))) for _ in range(3)))
    assert grades == [[GOOD] * 12] * 3
    assert judge.most_at_once == 2


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_what_may_pass_is_tried_again(pool, judge, status):
    began, retries = time.monotonic(), pool.stats["my-judge"].retries
    assert await grade(pool, f"busy {status} 1") == [GOOD, GOOD]
    assert time.monotonic() - began >= 1  # Retry-After
    assert pool.stats["my-judge"].retries == retries + 1


async def test_a_date_that_cannot_be_is_no_wait(pool):
    absurd = "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"
    assert await grade(pool, f"busy 503 {absurd}") == [GOOD, GOOD]


async def test_after_a_time_out_the_rest_of_the_tree_is_not_sent(pool, judge, monkeypatch):
    """Nor are its questions made."""
    made, question = [], http_module._question
    monkeypatch.setattr(
        http_module, "_question", lambda *args: made.append(args) or question(*args)
    )
    judge[0].asked.clear()
    began = time.monotonic()
    grades = await grade(pool, "hang", *map(str, range(400)))
    assert time.monotonic() - began < 5  # and not 50 times 0.5 s
    assert len(judge[0].asked) <= len(made) == 2
    slow = "the reward server took longer than 0.5 s"
    assert [one.error for one in grades].count(slow) == 8
    rest = {one.error for one in grades if one.error != slow}
    assert rest == {f"not sent: for an earlier batch of this tree, {slow}"}
    assert await grade(pool, "lengths", "abc") == [Grade(reward=3.0)]  # the next tree is


async def test_a_judge_that_is_not_there_is_asked_for_no_whole_tree():
    pool = RewardPool(
        {"judge": f"http://127.0.0.1:{free_port()}/"},
        http=HttpLimits(batch=1, connections=2, attempts=2),
    )
    try:
        grades = await pool.grade("judge", [str(n) for n in range(200)], "72", {})
        assert all(one.error for one in grades)
        assert grades[-1].error.startswith("not sent: for an earlier batch of this tree, the")
        assert pool.stats["judge"].retries <= 4
    finally:
        await pool.close()


async def test_errors_for_longer_than_retries_last_cost_the_rest_of_the_tree(judge):
    """Where nothing else is heard; one poor batch among good ones costs itself."""
    http = HttpLimits(batch=1, connections=1, attempts=2, retry_s=0.5)
    pool = RewardPool({"judge": judge[1]}, http=http)
    try:
        judge[0].asked.clear()
        grades = await pool.grade("judge", [str(n) for n in range(40)], "status 500", {})
        assert grades[-1].error.startswith("not sent: for an earlier batch of this tree, the")
        assert len(judge[0].asked) < 20
    finally:
        await pool.close()


async def test_trees_behind_those_that_hang_end_with_them(judge):
    http = HttpLimits(batch=1, connections=1, timeout_s=0.5, retry_s=0.25)
    pool = RewardPool({"judge": judge[1]}, http=http)
    try:
        began = time.monotonic()
        trees = (pool.grade("judge", [str(n)], "hang", {}) for n in range(20))
        graded = await asyncio.gather(*trees)
        assert time.monotonic() - began < 5  # and not 20 times 0.5 s
        errors = {one.error for grades in graded for one in grades}
        assert errors == {
            "the reward server took longer than 0.5 s",
            "the reward server answers nobody, and every connection is taken",
        }
    finally:
        await pool.close()


async def test_callers_that_go_away_leave_no_connection_taken(pool):
    """Before they have one, in the line, while they are graded."""
    for wait in range(100):
        answers = map(str, range(12))
        task = asyncio.create_task(grade(pool, ("slow", "hang")[wait % 2], *answers))
        for _ in range(wait):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert pool._graders["my-judge"]._connections._free._value == 2
    assert await grade(pool, "later") == [GOOD, GOOD]


async def test_a_slow_judge_that_answers_is_waited_for(judge):
    http = HttpLimits(batch=1, connections=1, timeout_s=0.6, retry_s=0.0)
    pool = RewardPool({"judge": judge[1]}, http=http)
    try:
        began = time.monotonic()
        trees = (pool.grade("judge", [str(n)], "slow", {}) for n in range(20))
        assert await asyncio.gather(*trees) == [[GOOD]] * 20
        assert time.monotonic() - began > 0.6
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("reference", "error", "requests"),
    [
        ("status 500", "the reward server answered 500 (3 attempts)", 3),
        ("busy 503 3600", "the reward server answered 503", 1),
        ("status 401", "the reward server answered 401; is SPOKE_REWARD_TOKEN_MY_JUDGE right?", 1),
        ("status 404", "the reward server answered 404", 1),
        ("status 422", "the reward server answered 422: no, (token)", 1),
        ("redirect", "the reward server answered 307, a redirect; give the URL where it leads", 1),
        ("raw nothing", "the reward server answered no JSON object", 1),
        ("raw [1.0, 1.0]", "the reward server answered no JSON object", 1),
        ("raw {}", "the reward server answered no list 'rewards'", 1),
        ('raw {"rewards": [1.0]}', "the reward server gave 1 rewards for 2", 1),
        ('raw {"rewards": [1, 1], "errors": []}', "the reward server gave 0 errors for 2", 1),
        ("zip", "the reward server answered no JSON object", 1),
        ("long", "the reward server answered more than 1048576 bytes", 1),
        ("hang", "the reward server took longer than 0.5 s", 1),
    ],
)
async def test_a_batch_without_rewards_costs_its_leaves(pool, judge, reference, error, requests):
    judge[0].asked.clear()
    stats = pool.stats["my-judge"]
    assert await grade(pool, reference) == [Grade(reward=0.0, error=error)] * 2
    assert len(judge[0].asked) == requests
    assert (stats.leaves, stats.failures) == (2, 2)


@pytest.mark.parametrize(
    ("answer", "errors"),
    [
        ('{"rewards": [1, null], "errors": [null, "half done"]}', [None, "half done"]),
        ('{"rewards": [1, null]}', [None, "the reward server gave null, not a finite number"]),
        ('{"rewards": [1, NaN]}', [None, "the reward server gave NaN, not a finite number"]),
        ('{"rewards": [1, "1"]}', [None, 'the reward server gave "1", not a finite number']),
        ('{"rewards": [1, true]}', [None, "the reward server gave true, not a finite number"]),
        ('{"rewards": [1, 2], "errors": ["", 5]}', ["the reward server gave an empty error", "5"]),
    ],
)
async def test_a_leaf_without_a_reward_costs_itself(pool, answer, errors):
    grades = await grade(pool, f"raw {answer}")
    assert [one.error for one in grades] == errors
    assert [one.reward for one in grades] == [1.0 if error is None else 0.0 for error in errors]


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("reference", "reward.reference"),
        ("reward.reference", "reward.reference"),
        ("options.strict", "reward.options.strict"),
    ],
)
async def test_a_refused_question_refuses_the_request(pool, said, field):
    for ask in (pool.check("my-judge", f"field {said}", {}), grade(pool, f"field {said}")):
        with pytest.raises(RequestError) as refused:
            await ask
        assert (refused.value.field, refused.value.status) == (field, 422)
        assert refused.value.detail == "not (token)"


async def test_a_field_that_is_not_the_questions_costs_leaves(pool):
    await pool.check("my-judge", "field responses", {})
    for one in await grade(pool, "field responses"):
        assert one.error == "the reward server answered 422: not (token)"


async def test_check_says_503_while_the_server_is_down_and_passes_when_it_is_back(judge):
    with served(judge[0].app) as url:
        port = int(url.rpartition(":")[2])
    http = HttpLimits(attempts=2)
    pool = RewardPool({"judge": f"{url}/grade"}, http=http)
    try:
        await pool.start(["judge"])
        with pytest.raises(RequestError, match="judge cannot grade now: the reward") as refused:
            await pool.check("judge", "72", {})
        assert (refused.value.field, refused.value.status) == ("reward.name", 503)
        (down,) = await pool.grade("judge", ["a"], "72", {})
        assert down.error == "the reward server cannot be reached: ConnectError (2 attempts)"
        back = served(judge[0].app)
        back.server.config.port = port
        with back:
            await pool.check("judge", "72", {})
            assert await pool.grade("judge", ["a"], "72", {}) == [GOOD]
        assert judge[0].authorization[-1] is None
        await pool.check("judge", "72", {})  # it has passed; nobody is asked
    finally:
        await pool.close()


async def test_check_says_503_where_no_leaf_could_be_graded(pool):
    for reference in ("status 403", "raw {}", "redirect", "hang"):
        with pytest.raises(RequestError) as refused:
            await pool.check("my-judge", reference, {})
        assert refused.value.status == 503
        assert TOKEN not in str(refused.value)


async def test_close_answers_for_what_runs(judge):
    pool = RewardPool({"judge": judge[1]})
    judge[0].asked.clear()
    running = asyncio.create_task(pool.grade("judge", ["a"], "hang", {}))
    async with asyncio.timeout(10):
        while not judge[0].asked:
            await asyncio.sleep(0.01)
    await pool.close()
    closed = [Grade(reward=0.0, error="the reward pool is closed")]
    assert await running == closed
    assert await pool.grade("judge", ["a"], "late", {}) == closed


async def test_options_that_json_cannot_say_are_refused(pool):
    with pytest.raises(RequestError) as refused:
        await pool.check("my-judge", "72", {"weight": float("nan")})
    assert refused.value.field == "reward.options"


@pytest.mark.parametrize("url", ["http://", "https://host:port/x", "http://[::1", "http://a b/"])
def test_a_url_that_cannot_be_is_refused(url):
    with pytest.raises(ConfigError, match="no such URL can be"):
        RewardPool({"judge": url})


def test_secrets_do_not_belong_into_urls_or_messages(monkeypatch):
    with pytest.raises(ConfigError, match="SPOKE_REWARD_TOKEN_NAME") as refused:
        RewardPool({"judge": f"https://me:{TOKEN}@host/grade"})
    assert TOKEN not in str(refused.value)


async def test_a_token_that_cannot_be_a_header_is_refused(monkeypatch):
    monkeypatch.setenv("SPOKE_REWARD_TOKEN_JUDGE", f"{TOKEN}\nX-Other: 1")
    with pytest.raises(ConfigError, match="SPOKE_REWARD_TOKEN_JUDGE") as refused:
        await RewardPool({"judge": "http://127.0.0.1:9/"}).start(["judge"])
    assert TOKEN not in str(refused.value)


async def test_the_server_in_the_documentation_works(monkeypatch):
    text = (ROOT / "docs" / "rewards.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {"__name__": "judge"}
    exec(compile(code, "docs/rewards.md", "exec", dont_inherit=True), space)
    monkeypatch.setenv("SPOKE_REWARD_TOKEN_JUDGE", "token-of-the-example")
    with served(space["app"]) as url:
        pool = RewardPool({"judge": f"{url}/grade"})
        try:
            await pool.check("judge", "72", {})
            grades = await pool.grade("judge", ["it is 72", "it is 73"], "72", {})
            assert grades == [GOOD, Grade(reward=0.0)]
            with pytest.raises(RequestError) as refused:
                await pool.check("judge", "", {})
            assert refused.value.field == "reward.reference"
            with monkeypatch.context() as patch:
                patch.setenv("SPOKE_REWARD_TOKEN_JUDGE", "another")
                stranger = RewardPool({"judge": f"{url}/grade"})
                await stranger.start(["judge"])
            (denied,) = await stranger.grade("judge", ["it is 72"], "72", {})
            assert "401" in (denied.error or "")
            await stranger.close()
        finally:
            await pool.close()
