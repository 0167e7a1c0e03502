"""The forms of `POST /rollout_tree` over real HTTP: negotiated, equal in content, refused before sampling."""

from typing import Any

import httpx
import pytest

from server.respond import OFF_LOOP_TOKENS, tree_response
from shared.codec import MediaType, decode, decompress
from shared.stream import Assembler
from shared.tree import Node
from shared.wire import RolloutTreeResponse
from tests.shared.test_codec import tree

BODY: dict[str, Any] = {
    "request_id": "formats",  # the same id gives the same tree, whatever its form
    "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "plan": {"kind": "tree", "branch_factors": [3, 2], "segment_tokens": 8},
    "sampling": {"max_tokens": 40, "seed": 5},
    "reward": {"name": "gsm8k", "reference": "17"},
}


@pytest.fixture
async def client(server_url: str):
    async with httpx.AsyncClient(base_url=server_url, timeout=60.0) as client:
        yield client


async def asked(client: httpx.AsyncClient, **headers: str) -> tuple[httpx.Headers, bytes]:
    """(headers, the body as it came over the wire)."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.stream("POST", "/rollout_tree", json=BODY, headers=names) as answer:
        assert answer.status_code == 200
        return answer.headers, b"".join([piece async for piece in answer.aiter_raw()])


async def test_the_forms_hold_one_tree(client: httpx.AsyncClient) -> None:
    plain = {"accept_encoding": "identity"}
    headers, body = await asked(client, **plain)
    assert headers["content-type"] == "application/json"
    assert headers["vary"] == "Accept, Accept-Encoding"
    assert "content-encoding" not in headers
    made = decode(body, MediaType.JSON)
    assert len(made.nodes) >= 4
    headers, packed = await asked(client, accept="application/msgpack", **plain)
    assert headers["content-type"] == "application/msgpack"
    assert headers["vary"] == "Accept, Accept-Encoding"
    assert decode(packed, MediaType.MSGPACK) == made
    assert len(packed) < len(body)


async def test_zstd_on_request(client: httpx.AsyncClient) -> None:
    _, plain = await asked(client, accept_encoding="gzip")
    headers, body = await asked(client, accept_encoding="zstd")
    assert headers["content-encoding"] == "zstd"
    assert decompress(body, 1 << 20) == plain
    # A body of packed arrays is compressed already.
    headers, body = await asked(client, accept_encoding="zstd", accept="application/msgpack")
    assert "content-encoding" not in headers
    assert decode(body, MediaType.MSGPACK) == decode(plain, MediaType.JSON)


async def test_a_form_that_is_not_offered_is_refused_before_sampling(
    client: httpx.AsyncClient,
) -> None:
    # A body that sampling would refuse as well: what is refused first is the form.
    bad = BODY | {"prompt": "", "request_id": None}
    answer = await client.post("/rollout_tree", json=bad, headers={"accept": "text/html"})
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["field"]) == (406, 406, "Accept")
    assert "application/msgpack" in problem["detail"]
    assert answer.headers["content-type"] == "application/problem+json"


async def test_openapi_names_the_forms(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    responses = document["paths"]["/rollout_tree"]["post"]["responses"]
    content = responses["200"]["content"]
    assert set(content) == set(MediaType)
    assert content["application/json"]["schema"]["$ref"].endswith("/RolloutTreeResponse")
    assert "406" in responses


@pytest.mark.parametrize("media", [MediaType.JSON, MediaType.MSGPACK])
async def test_a_large_tree_takes_the_way_off_the_loop_and_is_the_same(media: MediaType) -> None:
    small = tree([5] * 10, [-0.5] * 10)
    count = OFF_LOOP_TOKENS
    node = Node(id=2, parent=0, depth=1, token_ids=[7] * count, logprobs=[-0.25] * count)
    large = small.model_copy(update={"nodes": [*small.nodes, node]})
    for made in (small, large):
        response = await tree_response(made, media, None)
        assert decode(bytes(response.body), media) == made
        assert isinstance(made, RolloutTreeResponse)


# --- application/x-ndjson ----------------------------------------------------


async def streamed(
    client: httpx.AsyncClient, request: dict[str, Any], encoding: str = "identity"
) -> tuple[list[Any], Any]:
    """(node lines in the order they came, the tree that they make)."""
    made, nodes = Assembler(), []
    headers = {"accept": "application/x-ndjson", "accept-encoding": encoding}
    async with client.stream("POST", "/rollout_tree", json=request, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        assert answer.headers.get("content-encoding", "identity") == encoding
        assert answer.headers["vary"] == "Accept, Accept-Encoding"
        async for line in answer.aiter_lines():
            got = made.feed(line)
            nodes.append(got)
    assert made.ended
    return nodes[:-1], nodes[-1]


@pytest.mark.parametrize("encoding", ["identity", "zstd"])
@pytest.mark.parametrize(
    "plan",
    [
        {"kind": "tree", "branch_factors": [3, 2, 2], "segment_tokens": 8},
        {"kind": "group", "samples": 4},
        {
            "kind": "chain",
            "samples": 2,
            "partition": {"kind": "fixed", "tokens": 9},
            "value_rollouts": 2,
        },
    ],
    ids=lambda plan: plan["kind"],
)
async def test_a_stream_makes_the_tree_that_json_gives(
    client: httpx.AsyncClient, plan: dict[str, Any], encoding: str
) -> None:
    request = {
        "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
        "plan": plan,
        "sampling": {"max_tokens": 40, "seed": 5},
        "reward": {"name": "gsm8k", "reference": "17"},
    }
    nodes, tree = await streamed(client, request, encoding)
    whole = (await client.post("/rollout_tree", json=request)).json()
    # Ids, tokens, texts, rewards and values; logprobs to the last bits, which depend on the batch beside them.
    for mine, theirs in zip(tree.model_dump(mode="json")["nodes"], whole["nodes"], strict=True):
        assert (mine.pop("logprobs") or []) == pytest.approx(theirs.pop("logprobs") or [], abs=1e-5)
        assert mine == theirs
    assert len(nodes) == len(tree.nodes)
    if plan["kind"] == "tree":
        # As they finish: some leaf was there before some first segment's other children were.
        assert [node.depth for node in nodes] != sorted(node.depth for node in nodes)


async def test_a_stream_of_a_kept_tree_is_whole(client: httpx.AsyncClient) -> None:
    request = {
        "request_id": "streamed-twice",
        "prompt": "Ana has 12 apples.",
        "plan": {"kind": "group", "samples": 3},
        "sampling": {"max_tokens": 20},
    }
    _, first = await streamed(client, request)
    _, again = await streamed(client, request)
    assert first == again


async def test_what_is_refused_has_its_own_status(client: httpx.AsyncClient) -> None:
    request = {"prompt": "a", "plan": {"kind": "group", "samples": 1}, "min_weight_version": 9}
    answer = await client.post(
        "/rollout_tree", json=request, headers={"accept": "application/x-ndjson"}
    )
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
