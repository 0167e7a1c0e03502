"""A tree that moves takes along what has finished; and the fleet's table may be away.

1. After a stream broke the next attempt gives the nodes that had come, each with its parent, and nothing else.
2. Nodes of several attempts add up; what is begun anew, or has become another, is forgotten.
3. A server that refuses given nodes is asked without them.
4. Plans whose nodes nobody could use are asked for whole.
5. A server that is silent is given up only where it does not say that it is ready.
6. Without the table the servers known so far are used, and it is said once.
"""

import asyncio
import logging
from typing import Any

import pytest
from fake_rollouts import Fake, FakeServer, problem
from fastapi.responses import Response, StreamingResponse

from shared import codec, stream
from shared.errors import CoordinationError, FleetError, RequestError
from shared.media import MediaType
from shared.stream import NodeLine, RestartLine
from shared.tree import FinishReason, Role
from shared.wire import ChainPlan, GroupPlan, RolloutTreeRequest, RolloutTreeResponse, TreePlan
from trainer.client import AsyncClient, Target, attempt, resume

REQUEST = RolloutTreeRequest(
    request_id="r", prompt="1", plan=TreePlan(branch_factors=[2, 2], segment_tokens=2)
)


def node(
    key: str, token: int = 5, reason: FinishReason | None = FinishReason.LENGTH, version: int = 3
) -> NodeLine:
    return NodeLine(
        key=key, depth=len(key.split(".")), role=Role.SEGMENT, token_ids=[token, 6], logprobs=[-0.5, -1.0],
        versions=[(version, 2)], finish_reason=reason, text="ab",
    )  # fmt: skip


PROMPT = NodeLine(
    key="", depth=0, role=Role.PROMPT, token_ids=[1], logprobs=None, versions=[], finish_reason=None, text="1"
)  # fmt: skip
KEYS = ["", "0", "0.0", "0.1", "1", "1.0", "1.1"]
ROLES: dict[str, Any] = {
    "nodes": [
        {
            "id": at, "parent": None if not key else KEYS.index(key[:-2] if "." in key else ""),
            "depth": len(key.split(".")) if key else 0, "role": "segment" if key else "prompt",
            "token_ids": [5, 6] if key else [1], "logprobs": [-0.5, -1.0] if key else None,
            "versions": [(3, 2)] if key else [], "finish_reason": "length" if key else None,
        }
        for at, key in enumerate(KEYS)
    ],
    "request_id": "r", "server_id": "s", "model": "m",
    "usage": {"prompt_tokens": 1, "sampled_tokens": 12, "computed_prefill_tokens": 1, "cached_tokens": 0},
    "weight_versions": {"min": 3, "max": 3}, "timing": {"queue_s": 0, "sample_s": 0, "reward_s": 0},
}  # fmt: skip
TREE = RolloutTreeResponse.model_validate(ROLES)


def streamed(*lines: stream.Line, whole: bool = False) -> StreamingResponse:
    """Lines, and an end that comes too early; or a whole tree."""

    async def body() -> Any:
        for line in lines:
            yield stream.dump(line)
        if whole:
            yield "".join(stream.lines(TREE))

    return StreamingResponse(body(), media_type="application/x-ndjson")


def given(server: FakeServer, attempt_: int = 1) -> list[str]:
    return [found["key"] for found in server.bodies[attempt_]["given"]]


async def ask(
    fake: Fake,
    *answers: Any,
    request: RolloutTreeRequest = REQUEST,
    keep_nodes: bool = True,
) -> FakeServer:
    """A server that gives these answers one after another, and then the tree."""
    server = fake(lambda i: answers[i] if i < len(answers) else streamed(whole=True))
    async with AsyncClient(server.url, timeout_s=10, keep_nodes=keep_nodes) as client:
        assert await client.rollout_tree(request) == TREE
    return server


# 1. and 2. What is given


async def test_the_next_attempt_gives_what_had_come(fake: Fake) -> None:
    cut_off = streamed(PROMPT, node("1"), node("1.0"), node("0", reason=FinishReason.STOP))
    server = await ask(fake, cut_off)
    first, second = server.bodies
    assert first["given"] == []
    assert given(server) == ["1", "0", "1.0"]
    assert second["given"][1] == {
        "key": "0", "token_ids": [5, 6], "logprobs": [-0.5, -1.0], "versions": [[3, 2]],
        "finish_reason": "stop",
    }  # fmt: skip
    assert first | {"given": None} == second | {"given": None}
    RolloutTreeRequest.model_validate(second)


async def test_a_server_that_hands_back_is_no_end_either(fake: Fake) -> None:
    going = problem_line(503)
    server = await ask(fake, streamed(node("1"), going))
    assert given(server) == ["1"]


def problem_line(status: int) -> stream.ErrorLine:
    found = stream.Problem(title="t", status=status, detail="this server is going")
    return stream.ErrorLine(problem=found)


async def test_nodes_of_several_attempts_add_up(fake: Fake) -> None:
    server = await ask(
        fake, streamed(node("0")), problem(503, **{"Retry-After": "0"}), streamed(node("1"))
    )
    assert [given(server, at) for at in (1, 2, 3)] == [["0"], ["0"], ["0", "1"]]


async def test_what_is_begun_anew_is_forgotten(fake: Fake) -> None:
    server = await ask(fake, streamed(node("0"), node("0.1"), RestartLine(version=4), node("1")))
    assert given(server) == ["1"]


async def test_a_node_that_has_become_another_takes_what_was_below_along(fake: Fake) -> None:
    server = await ask(
        fake, streamed(node("0"), node("0.1"), node("1"), node("1.1")), streamed(node("0", 9))
    )
    assert given(server, 2) == ["0", "1", "1.1"]
    assert server.bodies[2]["given"][0]["token_ids"] == [9, 6]


async def test_only_what_a_server_can_use_is_given(fake: Fake) -> None:
    aborted = node("0", reason=FinishReason.ABORT)
    server = await ask(fake, streamed(aborted, node("0.1"), node("1")))
    assert given(server) == ["1"]


async def test_what_is_given_is_bounded(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "MOST_BYTES", 2 * (resume.NODE_BYTES + 2 * resume.TOKEN_BYTES))
    server = await ask(fake, streamed(node("0"), node("0.1"), node("1"), node("1.1")))
    assert given(server) == ["0", "1"]


# 3. and 4. What servers do not take


@pytest.mark.parametrize(("status", "field"), [(422, "given.0.key"), (413, "body")])
async def test_a_server_that_refuses_nodes_is_asked_without(
    fake: Fake, status: int, field: str
) -> None:
    server = await ask(fake, streamed(node("0")), problem(status, field))
    assert [len(body["given"]) for body in server.bodies] == [0, 1, 0]


async def test_nodes_of_the_callers_own_that_are_refused_are_refused(fake: Fake) -> None:
    own = {"key": "7", "token_ids": [1], "logprobs": [-1.0], "versions": [[0, 1]]}
    request = RolloutTreeRequest.model_validate(
        REQUEST.model_dump() | {"given": [own | {"finish_reason": "stop"}]}
    )
    with pytest.raises(RequestError, match=r"given\.0\.key: no"):
        await ask(fake, problem(422, "given.0.key"), request=request)


@pytest.mark.parametrize("why", ["not asked for", "a chain"])
async def test_whole_trees_are_asked_for_where_nodes_are_of_no_use(fake: Fake, why: str) -> None:
    chain = ChainPlan(samples=1, value_rollouts=1)
    request = REQUEST.model_copy(update={"plan": chain}) if why == "a chain" else REQUEST
    whole = Response(codec.encode(TREE, MediaType.MSGPACK), media_type="application/msgpack")
    server = await ask(
        fake, problem(500), whole, request=request, keep_nodes=why != "not asked for"
    )
    assert server.headers[1]["accept"] == "application/msgpack, application/json;q=0.5"
    assert server.bodies[1]["given"] == []


# 5. Silence


async def test_a_server_that_is_silent_and_ready_is_waited_for(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "SILENT_S", 0.05)
    monkeypatch.setattr(attempt, "LOST_S", 5.0)

    async def late() -> Any:
        await asyncio.sleep(0.5)  # some ten silences
        return streamed(whole=True)

    server = fake(lambda i: late())
    async with AsyncClient(server.url, timeout_s=10) as client:
        assert await client.rollout_tree(REQUEST) == TREE
    assert len(server.bodies) == 1


async def test_a_server_that_hangs_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "SILENT_S", 0.05)
    monkeypatch.setattr(attempt, "LOST_S", 0.2)
    hangs, good = FakeServer(lambda i: hangs.stall()), fake(lambda i: streamed(whole=True))
    hangs.ready = hangs.stall

    async def in_order() -> list[Target]:
        return [Target(url=hangs.url), Target(url=good.url, load=9)]

    with hangs.running():
        async with AsyncClient(in_order, affinity_slack=0, timeout_s=10) as client:
            assert await client.rollout_tree(REQUEST) == TREE
    assert len(hangs.bodies) == 1
    assert hangs.left.is_set()


# 6. Without the table


async def test_without_the_table_the_known_servers_are_used(
    fake: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.client.listing.REFRESH_S", 0.0)
    monkeypatch.setattr("trainer.client.async_client.REFRESH_S", 0.0)
    server, calls = fake(lambda i: streamed(whole=True)), 0

    async def table() -> list[Target]:
        nonlocal calls
        calls += 1
        if calls in (2, 3, 5):
            raise CoordinationError("Redis is away")
        return [Target(url=server.url)]

    caplog.set_level(logging.WARNING, "spoke.client")
    async with AsyncClient(table, timeout_s=10) as client:
        for _ in range(6):
            await client.rollout_tree(REQUEST)
    assert calls == 6
    assert [r.message for r in caplog.records] == [
        "Redis is away; going on with the servers known so far"
    ] * 2, "once for each time that it goes away"


async def test_a_table_that_never_came_is_waited_for_until_the_bound() -> None:
    async def table() -> list[Target]:
        raise CoordinationError("Redis is away")

    async with AsyncClient(table, timeout_s=0.3) as client:
        with pytest.raises(FleetError, match="no live server is ready; Redis is away"):
            await client.rollout_tree(REQUEST.model_copy(update={"plan": GroupPlan(samples=1)}))
