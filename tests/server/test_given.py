"""Requests that give nodes, over HTTP: what is taken, what is refused, and what it costs.

1. A tree goes on from what another attempt returned: the tree is the same, and only the rest is sampled.
2. Given nodes that cannot stand in the tree are refused, with the node and what is wrong with it.
3. The same id is the same tree; nodes that one client gave reach nobody else by it.
4. Nodes of weights that are too old are sampled again, with all below them.
"""

import json
from typing import Any

import httpx
import pytest

from server.given import usable
from shared.stream import Assembler, NodeLine, lines
from shared.wire import GivenNode, GroupPlan, RolloutTreeRequest, RolloutTreeResponse, TreePlan

BODY: dict[str, Any] = {
    "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "plan": {"kind": "tree", "branch_factors": [3, 2], "segment_tokens": 10},
    "sampling": {"max_tokens": 60, "seed": 5},
    "return_text": False,
}
FIELDS = ("key", "token_ids", "logprobs", "versions", "finish_reason")


def post(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/rollout_tree", json=body, headers=headers, timeout=60)


def tree(answer: httpx.Response) -> RolloutTreeResponse:
    assert answer.status_code == 200, answer.text
    return RolloutTreeResponse.model_validate_json(answer.content)


def shape(whole: RolloutTreeResponse) -> list[Any]:
    """What is exact: logprobs differ in their last digits with what else is in the batch."""
    return [(n.parent, n.token_ids, n.versions, n.finish_reason) for n in whole.nodes]


def given_of(whole: RolloutTreeResponse) -> dict[str, dict[str, Any]]:
    """All nodes of a tree in the form in which requests give them, by key."""
    read = [json.loads(line) for line in lines(whole)]
    nodes = [node for node in read if node["kind"] == "node" and node["key"]]
    return {node["key"]: {field: node[field] for field in FIELDS} for node in nodes}


@pytest.fixture(scope="module")
def whole(server_url: str) -> RolloutTreeResponse:
    return tree(post(server_url, BODY))


def test_only_what_is_missing_is_sampled(server_url: str, whole: RolloutTreeResponse) -> None:
    nodes = given_of(whole)
    some = [nodes[key] for key in ("1.0", "1", "2")]  # in no order
    resumed = tree(post(server_url, BODY | {"given": some}))
    assert shape(resumed) == shape(whole)
    assert [resumed.nodes[at].logprobs for at in (4, 5)] == [
        whole.nodes[at].logprobs for at in (4, 5)
    ]
    had = sum(len(node["token_ids"]) for node in some)
    assert resumed.usage.given_tokens == had
    assert resumed.usage.sampled_tokens == whole.usage.sampled_tokens - had
    everything = tree(post(server_url, BODY | {"given": list(nodes.values())}))
    assert everything.nodes == whole.nodes  # to the last bit
    assert everything.usage.sampled_tokens == 0


def test_a_stream_tells_of_given_nodes_too(server_url: str, whole: RolloutTreeResponse) -> None:
    nodes = given_of(whole)
    answer = post(
        server_url,
        BODY | {"given": [nodes["0"], nodes["2"], nodes["2.1"]]},
        Accept="application/x-ndjson",
    )
    assembler, told = Assembler(), []
    for line in answer.text.splitlines():
        found = assembler.feed(line)
        if isinstance(found, NodeLine):
            told.append(found.key)
    assert isinstance(found, RolloutTreeResponse)
    assert shape(found) == shape(whole)
    assert told[:2] == ["0", "2"], "what is there already does not wait for what is not"


def changed(
    nodes: dict[str, dict[str, Any]], key: str, changes: dict[str, Any]
) -> list[dict[str, Any]]:
    """A node, with its parent before it."""
    parent = [nodes[key[:-2]]] if "." in key else []
    return [*parent, nodes[key] | changes]


@pytest.mark.parametrize(
    ("key", "changes", "field", "says"),
    [
        ("0", {"key": "3"}, "given.0.key", "beyond the 3 children"),
        ("0", {"key": "0.0"}, "given.0.key", "parent of '0.0' is missing"),
        ("0.0", {"key": "0.0.0"}, "given.1.key", "the plan ends at 2"),
        ("0.0", {"key": "0"}, "given.1.key", "is there twice"),
        ("0", {"key": ""}, "given.0.key", "at least 1 character"),
        ("0", {"key": "00"}, "given.0.key", "match pattern"),
        ("0", {"logprobs": [-1.0]}, "given.0.logprobs", "1 logprobs for 10 tokens"),
        ("0", {"logprobs": [-1.0] * 9 + [0.5]}, "given.0.logprobs", "0.5 is above 0"),
        ("0", {"versions": [[0, 9]]}, "given.0.versions", "9 tokens, and there are 10"),
        ("0", {"versions": [[0, 9, 1]]}, "given.0.versions.0", ""),
        ("0", {"versions": [["0", 10]]}, "given.0.versions.0.0", "valid integer"),
        ("0", {"finish_reason": "abort"}, "given.0.finish_reason", "'stop' or 'length'"),
        ("0", {"token_ids": [10**6] * 10}, "given.0.token_ids", "1000000 is no token"),
        (
            "0",
            {"token_ids": [5] * 11, "logprobs": [-1.0] * 11, "versions": [[0, 11]]},
            "given.0.token_ids",
            "11 tokens, and the plan allows 10 here",
        ),
        (
            "0",
            {"token_ids": [5] * 9, "logprobs": [-1.0] * 9, "versions": [[0, 9]]},
            "given.0.finish_reason",
            "fewer than the 10",
        ),
        (
            "0.0",
            {"token_ids": [5] * 51, "logprobs": [-1.0] * 51, "versions": [[0, 51]]},
            "given.1.token_ids",
            "51 tokens, and the plan allows 50 here",
        ),
        ("0", {"token_ids": [], "logprobs": [], "versions": []}, "given.0.token_ids", ""),
        ("0", {"depth": 1}, "given.0.depth", "unknown field"),
    ],
)
def test_what_cannot_stand_in_the_tree_is_refused(
    server_url: str,
    whole: RolloutTreeResponse,
    key: str,
    changes: dict[str, Any],
    field: str,
    says: str,
) -> None:
    answer = post(server_url, BODY | {"given": changed(given_of(whole), key, changes)})
    assert answer.status_code == 422
    assert (answer.json()["field"], says in answer.json()["detail"]) == (field, True), answer.text


def test_nothing_follows_a_response_that_has_ended(
    server_url: str, whole: RolloutTreeResponse
) -> None:
    first, below = changed(given_of(whole), "0.0", {})
    answer = post(server_url, BODY | {"given": [first | {"finish_reason": "stop"}, below]})
    assert (answer.status_code, answer.json()["field"]) == (422, "given.1.key")


@pytest.mark.parametrize(
    "change",
    [
        {"plan": {"kind": "chain", "samples": 1, "value_rollouts": 1}},
        {"savings": {"probe": 2}, "reward": {"name": "gsm8k", "reference": "17"}},
        {"savings": {"branch_tokens": 10}},
    ],
)
def test_not_where_the_nodes_would_mean_something_else(
    server_url: str, whole: RolloutTreeResponse, change: dict[str, Any]
) -> None:
    answer = post(server_url, BODY | change | {"given": [given_of(whole)["0"]]})
    assert (answer.status_code, answer.json()["field"]) == (422, "given")


def test_the_same_id_is_the_same_tree_also_for_who_gives_nodes(
    server_url: str, whole: RolloutTreeResponse
) -> None:
    named, nodes = BODY | {"request_id": "given-or-not"}, given_of(whole)
    first = tree(post(server_url, named))
    assert tree(post(server_url, named | {"given": [nodes["1"]]})) == first
    resumed = BODY | {"request_id": "resumed", "given": [nodes["1"]]}
    again = tree(post(server_url, resumed))
    assert again.usage.given_tokens > 0
    assert tree(post(server_url, resumed)) == again


def test_given_nodes_reach_nobody_who_did_not_give_them(
    server_url: str, whole: RolloutTreeResponse
) -> None:
    """A client may make them up; another one may use the same id, and gets what the server has sampled."""
    named, nodes = BODY | {"request_id": "shared"}, given_of(whole)
    planted = nodes["1"] | {"token_ids": [7] * 10}
    theirs = tree(post(server_url, named | {"given": [planted]}))
    assert [7] * 10 in [node.token_ids for node in theirs.nodes]
    with_others = tree(post(server_url, named | {"given": [nodes["0"]]}))
    without = tree(post(server_url, named))
    assert shape(with_others) == shape(without) == shape(whole)
    assert without.usage.given_tokens == 0


def test_nodes_of_weights_that_the_server_has_not_heard_of_are_sampled_again(
    server_url: str, whole: RolloutTreeResponse
) -> None:
    later = [
        node | {"versions": [[999, len(node["token_ids"])]]} for node in given_of(whole).values()
    ]
    found = tree(post(server_url, BODY | {"given": later}))
    assert shape(found) == shape(whole)
    assert found.usage.given_tokens == 0
    assert found.usage.discarded_tokens == sum(len(node["token_ids"]) for node in later)


def node(key: str, version: int) -> GivenNode:
    return GivenNode(
        key=key, token_ids=[1], logprobs=[-1.0], versions=[(version, 1)], finish_reason="length"
    )


def test_nodes_of_older_or_unknown_weights_are_of_no_use_and_nor_is_what_follows_them() -> None:
    request = RolloutTreeRequest(
        prompt="1",
        plan=TreePlan(branch_factors=[2, 2], segment_tokens=1),
        min_weight_version=3,
        given=[node(*of) for of in (("0.0", 4), ("0", 2), ("1", 3), ("1.1", 4), ("1.0", 5))],
    )
    assert set(usable(request, 4, 4)) == {(1,), (1, 1)}


def test_a_tree_that_begins_anew_takes_nodes_of_the_newest_weights_alone() -> None:
    request = RolloutTreeRequest(
        prompt="1",
        plan=GroupPlan(samples=3),
        in_flight="restart",
        given=[node("0", 2), node("1", 3), node("2", 4)],
    )
    assert set(usable(request, 3, 4)) == {(1,)}
