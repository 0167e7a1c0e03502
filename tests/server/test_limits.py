"""What a request may cost: bodies bounded in bytes and seconds, plans in size; odd input is never a 5xx.

1. A body that is too large is refused without reading more than the bound, however it is sent.
2. A body that comes too slowly is refused in time.
3. Plans and prompts are bounded; the field is named.
4. Whatever JSON, encoding or media type comes, the answer is a 4xx problem document.
5. Requests carry no code: rewards go by registered name, and nothing that a request brings is unpickled.
"""

import ast
import asyncio
import contextlib
import json
import pickle
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from support import ServerProcess, on_a_socket, running_server

from server.app import Holder, create_app
from server.body import BodyLimit
from server.engines.base import EngineInfo
from server.limits import Limits, leaves
from server.prompts import prompt_ids
from server.status import Status
from server.tokens import Tokens
from shared.errors import RequestError
from shared.wire import RolloutTreeRequest

ROOT = Path(__file__).resolve().parents[2]
BOUND = 65_536
PROMPT = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
GROUP = {"kind": "group", "samples": 1}


@pytest.fixture(scope="module")
def bounded(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ["--engine", "transformers", "--dtype", "float32", "--max-model-len", "128"]
    bounds = ["--max-body-mib", str(BOUND / 2**20), "--max-leaves", "16", "--max-depth", "3"]
    log = tmp_path_factory.mktemp("bounded") / "log"
    with running_server(tiny_math, log, *arguments, *bounds) as server:
        yield server
        assert "Traceback" not in log.read_text()


def body(**changes: Any) -> dict[str, Any]:
    base = {"prompt": PROMPT, "plan": GROUP, "sampling": {"max_tokens": 4}}
    return {key: value for key, value in (base | changes).items() if value is not None}


def assert_problem(answer: httpx.Response, status: int, field: str | None) -> None:
    problem = answer.json()
    assert (answer.status_code, problem["status"]) == (status, status), problem
    assert problem.get("field") == field, problem
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_that_says_it_is_too_large_is_refused_unread(bounded: ServerProcess) -> None:
    url = httpx.URL(bounded.url)
    head = (
        "POST /rollout_tree HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {10**12}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 0), timeout=10) as connection:
        connection.sendall(head.encode())  # and not one byte of the body
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"--max-body-mib" in answer


def test_a_large_body_is_refused_however_it_is_sent(bounded: ServerProcess) -> None:
    large = json.dumps(body(prompt="x" * BOUND)).encode()
    headers = {"Content-Type": "application/json"}
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 65_536
            yield b"x" * 65_536

    whole = httpx.post(f"{bounded.url}/rollout_tree", content=large, headers=headers)
    assert_problem(whole, 413, "body")
    # httpx sends a generator in chunks, without a Content-Length, until the server closes.
    chunked = httpx.post(f"{bounded.url}/rollout_tree", content=endless(), headers=headers)
    assert_problem(chunked, 413, "body")
    assert sent < 100 * 2**20


def test_a_body_at_the_bound_is_served(bounded: ServerProcess) -> None:
    text = json.dumps(body())
    headers = {"Content-Type": "application/json"}
    fits = text + " " * (BOUND - len(text))
    url = f"{bounded.url}/rollout_tree"
    assert httpx.post(url, content=fits, headers=headers).status_code == 200
    assert_problem(httpx.post(url, content=fits + " ", headers=headers), 413, "body")
    pieces = (fits[at : at + 100].encode() for at in range(0, BOUND, 100))
    assert httpx.post(url, content=pieces, headers=headers).status_code == 200


@contextlib.asynccontextmanager
async def served(limits: Limits) -> AsyncIterator[int]:
    """Port of a real uvicorn with the application, without a model."""
    async with on_a_socket(create_app(Holder(Status(server_id="x")), limits=limits)) as port:
        yield port


HEAD = "POST /rollout_tree HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def test_a_body_that_stops_coming_is_refused_in_time() -> None:
    async with served(Limits(body_idle_s=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f'{HEAD}Content-Length: 100\r\n\r\n{{"prompt"'.encode())
        answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the server closes
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"application/problem+json" in answer
        writer.close()


async def test_a_body_that_drips_is_refused_in_time() -> None:
    async with served(Limits(body_idle_s=5.0, body_s=0.5)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{HEAD}Content-Length: 100000\r\n\r\n".encode())

        async def drip() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        answer = await asyncio.wait_for(reader.read(), 5)
        dripping.cancel()
        assert answer.startswith(b"HTTP/1.1 408")
        writer.close()


async def test_a_client_that_goes_away_while_sending_reaches_no_route() -> None:
    reached = []

    async def app(scope, receive, send) -> None:
        reached.append(scope)

    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "path": "/rollout_tree", "headers": []}
    await BodyLimit(app, Limits())(scope, receive, receive)
    assert not reached
    assert not messages


async def test_a_route_still_hears_that_its_client_goes_away() -> None:
    heard = []

    async def app(scope, receive, send) -> None:
        heard.extend([await receive(), await receive()])

    messages = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "path": "/rollout_tree", "headers": []}
    await BodyLimit(app, Limits())(scope, receive, receive)
    assert heard[0] == {"type": "http.request", "body": b"ab", "more_body": False}
    assert heard[1] == {"type": "http.disconnect"}


def tree(*factors: int) -> dict[str, Any]:
    return {"kind": "tree", "branch_factors": list(factors), "segment_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"plan": tree(4, 2, 2)}, 200, None),
        ({"plan": tree(4, 2, 3)}, 413, "plan"),
        ({"plan": tree(*[256] * 3)}, 413, "plan"),
        ({"plan": tree(1, 1, 1, 1)}, 422, "plan.branch_factors"),
        ({"plan": tree(*[1] * 17)}, 422, "plan.branch_factors"),
        ({"plan": tree(257)}, 422, "plan.branch_factors.0"),
        ({"plan": {"kind": "group", "samples": 17}}, 413, "plan"),
        ({"plan": {"kind": "group", "samples": 4097}}, 422, "plan.samples"),
        ({"plan": {"kind": "chain", "samples": 4, "value_rollouts": 4}}, 413, "plan"),
        ({"prompt": "12 " * 128}, 422, "prompt"),
        ({"prompt": "x" * 33_000}, 422, "prompt"),
        ({"prompt": None, "prompt_token_ids": [5] * 128}, 422, "prompt_token_ids"),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "x" * 33_000}]},
            422,
            "messages",
        ),
        ({"prompt": None, "messages": [{"role": "user", "content": ""}] * 1025}, 422, "messages"),
        ({"sampling": {"stop": ["x"] * 17}}, 422, "sampling.stop"),
        ({"sampling": {"stop": ["x" * 201]}}, 422, "sampling.stop.0"),
        ({"sampling": {"stop": [""]}}, 422, "sampling.stop.0"),
        ({"request_id": "x" * 201}, 422, "request_id"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_plans_and_prompts_are_bounded(
    bounded: ServerProcess, changes: dict[str, Any], status: int, field: str | None
) -> None:
    answer = httpx.post(f"{bounded.url}/rollout_tree", json=body(**changes), timeout=60.0)
    if status == 200:
        assert answer.status_code == 200, answer.text
    else:
        assert_problem(answer, status, field)


MANY = 100_000


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"prompt": None, "prompt_token_ids": [-1] * MANY}, "prompt_token_ids"),
        ({"prompt": None, "messages": [{}] * MANY}, "messages"),
        ({"prompt": None, "messages": [{"role": "user", "content": ""}] * MANY}, "messages"),
        ({"sampling": {"stop": [1] * MANY}}, "sampling"),
        ({"plan": {"kind": "tree", "segment_tokens": 4, "branch_factors": [0] * MANY}}, "plan"),
        ({"plan": GROUP | {f"unknown {i}": 1 for i in range(MANY)}}, "plan"),
        ({f"unknown {i}": 1 for i in range(MANY)}, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_refusal_costs_little_however_much_is_wrong(
    changes: dict[str, Any], path: str | None
) -> None:
    with pytest.raises(ValidationError) as refused:
        RolloutTreeRequest.model_validate(body(**changes))
    assert refused.value.error_count() <= 2
    assert next(iter(refused.value.errors()[0]["loc"]), None) == path


async def test_a_refusal_quotes_little_of_what_was_sent() -> None:
    async with served(Limits()) as port, httpx.AsyncClient() as client:
        sent = body(plan={"kind": [1] * MANY})
        answer = await client.post(f"http://127.0.0.1:{port}/rollout_tree", json=sent)
    assert_problem(answer, 422, "plan")
    assert len(answer.content) < 1000


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/openapi.json", "/docs"])
async def test_an_open_path_takes_no_body(path: str) -> None:
    async with served(Limits()) as port:
        for header in ("Content-Length: 1000000", "Transfer-Encoding: chunked"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the server closes
            assert answer.startswith(b"HTTP/1.1 400")
            writer.close()
        async with httpx.AsyncClient() as client:
            answer = await client.get(
                f"http://127.0.0.1:{port}{path}", headers={"Content-Length": "0"}
            )
            assert answer.status_code in (200, 503)


class CountingTokens(Tokens):
    """A fake: notes where it tokenises, a token a character."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.threads.append(threading.current_thread().name)
        return [0] * len(text)


async def test_long_prompts_are_tokenised_beside_the_event_loop() -> None:
    info = EngineInfo(
        engine="none", model="none", dtype="float32", device="cpu", vocab_size=1, max_model_len=32_768,
        eos_token_ids=(), max_batch=1, kv_tokens=1, block_tokens=1,
    )  # fmt: skip
    tokens = CountingTokens()
    for characters in (100, 30_000):
        request = RolloutTreeRequest.model_validate(body(prompt="x" * characters))
        assert len(await prompt_ids(request, tokens, info)) == characters
    short, long = tokens.threads
    assert short == threading.current_thread().name != long
    request = RolloutTreeRequest.model_validate(body(prompt="x" * (32 * 32_768 + 1)))
    with pytest.raises(RequestError, match="more than 32 for each token") as refused:
        await prompt_ids(request, tokens, info)
    assert refused.value.field == "prompt"
    assert len(tokens.threads) == 2


def test_limits_name_what_is_too_much() -> None:
    limits = Limits(branch_factor=3, samples=5, messages=1)
    messages = [{"role": "user", "content": "a"}] * 2
    for changes, field in (
        ({"plan": tree(3, 4)}, "plan.branch_factors.1"),
        ({"plan": {"kind": "group", "samples": 6}}, "plan.samples"),
        ({"plan": {"kind": "chain", "samples": 1, "value_rollouts": 6}}, "plan.value_rollouts"),
        ({"prompt": None, "messages": messages}, "messages"),
    ):
        with pytest.raises(RequestError, match="more than this server's bound") as refused:
            limits.check(RolloutTreeRequest.model_validate(body(**changes)))
        assert refused.value.field == field


def test_leaves_are_counted_without_sampling() -> None:
    request = RolloutTreeRequest.model_validate(body(plan=tree(*[256] * 16)))
    assert leaves(request.plan) == 256**16
    with pytest.raises(RequestError, match=r"3\.4e\+38 leaves"):
        Limits().check(request)


VALID = json.dumps(body())
DEEP = 100_000


def with_options(text: str) -> str:
    return VALID[:-1] + ', "reward": {"name": "gsm8k", "reference": "17", "options": ' + text + "}}"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"null", 422),
        (b"[]", 422),
        (b'"text"', 422),
        (b"1", 422),
        (b"{", 400),
        (VALID.encode() + b"x", 400),
        (VALID.encode("utf-16"), 400),
        (VALID.encode("utf-8-sig"), 400),
        (b"[" * (BOUND // 2) + b"]" * (BOUND // 2), 400),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400),
        (with_options('{"a": ' + "[" * 5_000 + "]" * 5_000 + "}").encode(), 400),
        (VALID.replace('"max_tokens": 4', '"max_tokens": 1' + "0" * 5_000).encode(), 400),
        (VALID.replace('"max_tokens": 4', '"max_tokens": 1' + "0" * 4_000).encode(), 422),
        (VALID.replace('"max_tokens": 4', '"seed": -1' + "0" * 100).encode(), 422),
        (VALID.replace('"max_tokens": 4', '"temperature": NaN').encode(), 400),
        (VALID.replace('"max_tokens": 4', '"temperature": Infinity').encode(), 400),
        (VALID.replace('"max_tokens": 4', '"temperature": 1e999').encode(), 422),
        (VALID.replace('"max_tokens": 4', '"top_k": 1e400').encode(), 422),
        (VALID.replace('"max_tokens": 4', '"top_p": -1e999').encode(), 422),
        (VALID.replace("Ana", "\\ud800").encode(), 400),
        (VALID.replace("Ana", "\\udfff\\ud800").encode(), 400),
        (VALID.encode().replace(b"Ana", b"\xff\xfe"), 400),
        (VALID.encode().replace(b"Ana", b"\xed\xa0\x80"), 400),
        (VALID.encode().replace(b"Ana", b"\x00"), 400),
        (VALID.replace('"prompt":', '"plan": 1, "prompt":').encode(), 400),
        (VALID.replace('"samples": 1', '"samples": 1, "samples": 2').encode(), 400),
        (with_options('{"a": 1, "a": 2}').encode(), 400),
        (with_options('{"unfinished": NaN}').encode(), 400),
        (with_options('{"unfinished": 1e999}').encode(), 422),
        (with_options('{"unfinished": 1' + "0" * 4_000 + "}").encode(), 422),
        (with_options('{"unfinished": "\\ud800"}').encode(), 400),
        (with_options('{"\\u0000": 1}').encode(), 422),
        (VALID.replace('"plan"', '"pl\\u0061n\\u0000"').encode(), 422),
    ],
    ids=lambda value: str(value)[:60].replace("\\", ""),
)
def test_odd_json_is_refused_and_never_an_error_of_ours(
    bounded: ServerProcess, content: bytes, status: int
) -> None:
    answer = httpx.post(
        f"{bounded.url}/rollout_tree",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert_problem(answer, status, answer.json().get("field"))
    assert answer.json()["detail"]


@pytest.mark.parametrize("text", ["{}", '{"a": 1e999}', '{"a": 1' + "0" * 4_000 + "}"])
def test_options_that_only_a_reward_function_can_judge(bounded: ServerProcess, text: str) -> None:
    content = with_options(text).replace("{", '{"request_id": "odd' + str(len(text)) + '", ', 1)
    answer = httpx.post(
        f"{bounded.url}/rollout_tree",
        content=content,
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    assert answer.status_code in (200, 422), answer.text


def test_odd_characters_in_a_prompt_are_served(bounded: ServerProcess) -> None:
    for prompt in ("\x00", "\ufffe", "🂡" * 3, "e\u0301", "\u202e abc"):
        answer = httpx.post(f"{bounded.url}/rollout_tree", json=body(prompt=prompt), timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["nodes"][0]["token_ids"]


@pytest.mark.parametrize(
    "media_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/x-python-pickle", "application/xml", "nonsense", ""],
)  # fmt: skip
def test_other_media_types_are_refused(bounded: ServerProcess, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    answer = httpx.post(f"{bounded.url}/rollout_tree", content=VALID.encode(), headers=headers)
    assert_problem(answer, 415, "body")


def test_json_under_its_other_names_is_served(bounded: ServerProcess) -> None:
    for media_type in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"):
        answer = httpx.post(
            f"{bounded.url}/rollout_tree",
            content=VALID.encode(),
            headers={"Content-Type": media_type},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "name", ["os:system", "server.rewards.gsm8k:gsm8k", "builtins:eval", "../gsm8k", "__import__"]
)
def test_rewards_go_by_registered_name_alone(bounded: ServerProcess, name: str) -> None:
    reward = {"name": name, "reference": "17"}
    answer = httpx.post(f"{bounded.url}/rollout_tree", json=body(reward=reward))
    assert_problem(answer, 422, "reward.name")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(bounded: ServerProcess, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "went-off"))
    for media_type in (
        "application/json",
        "application/octet-stream",
        "application/x-python-pickle",
    ):
        answer = httpx.post(
            f"{bounded.url}/rollout_tree", content=bomb, headers={"Content-Type": media_type}
        )
        assert 400 <= answer.status_code < 500
    assert not (tmp_path / "went-off").exists()
    pickle.loads(bomb)
    assert (tmp_path / "went-off").exists(), "this test can fail"


def test_no_source_file_unpickles_or_evaluates() -> None:
    """But for the pipe to a reward process: the server pickles questions for it, and unpickles nothing."""
    ours = {"server/rewards/process.py: pickle", "server/rewards/worker.py: pickle"}
    modules = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
    calls = {"eval", "exec", "compile", "__import__"}
    found = []
    for path in sorted([*ROOT.glob("server/**/*.py"), *ROOT.glob("shared/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} & modules
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]} & modules
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & calls
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names]
    assert set(found) == ours
    assert "pickle.load" not in (ROOT / "server/rewards/process.py").read_text()
