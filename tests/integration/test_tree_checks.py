"""The load test's checks: real trees of a real server pass, and every kind of planted fault is found.

1. Trees of each plan, with a reward and without, have no fault, and neither has their plain forward pass.
2. A fault in one number, one token, one node or one place is found.
3. The checking process counts a wrong tree and writes it out; of two trees by one id it sees that they differ.
"""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import running_server
from transformers import AutoTokenizer

from shared.codec import MediaType, encode
from shared.stream import lines
from shared.tree import FinishReason, Node, Role
from shared.wire import RolloutTreeRequest, RolloutTreeResponse
from tests.benchmarks.load_parts import mix
from tests.benchmarks.load_parts.checker import Answer, Checker, Setup, tree_of_answer
from tests.benchmarks.load_parts.plain_model import PlainModel
from tests.benchmarks.load_parts.tree_checks import Truth, faults

TREE, CHAIN, GROUP = 0, 8, 6
"""Of `mix.PLANS`: 6-6-6, a chain cut every 24 tokens, eight samples."""
Nodes = list[Node]
QUESTION = mix.questions(1, 1)[0]


@dataclass(frozen=True)
class Real:
    """Trees of a real server, by plan, and what they are checked by."""

    truth: Truth
    plain: PlainModel
    trees: dict[int, tuple[RolloutTreeRequest, RolloutTreeResponse]]


@pytest.fixture(scope="module")
def real(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    log = tmp_path_factory.mktemp("checks") / "server.log"
    with running_server(tiny_math, log, "--engine", "transformers", "--dtype", "float32") as server:
        tokenizer = AutoTokenizer.from_pretrained(tiny_math)
        trees = {}
        for number, plan in enumerate(mix.PLANS):
            body = mix.plain_body(QUESTION, plan) | {"return_text": True}
            body["sampling"] |= {"seed": 3}
            answer = httpx.post(f"{server.url}/rollout_tree", json=body, timeout=60)
            found = Answer(number, body, MediaType.JSON, "", answer.content)
            trees[number] = RolloutTreeRequest.model_validate(body), tree_of_answer(found)
    return Real(
        truth=Truth(
            encode=lambda text: list(tokenizer(text)["input_ids"]),
            decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
            ends=frozenset({1}),
            context=512,
        ),
        plain=PlainModel(tiny_math),
        trees=trees,
    )


@pytest.mark.parametrize("number", range(len(mix.PLANS)))
def test_a_right_tree_has_no_fault(real: Real, number: int) -> None:
    request, tree = real.trees[number]
    assert faults(request, tree, real.truth) == []
    assert real.plain.faults(request, tree) == []


# --- planted faults ----------------------------------------------------------------------------------------


def with_(node: Node, **changes: Any) -> Node:
    """The node with something else in it; nothing is validated."""
    return node.model_copy(update=changes)


def leaves(nodes: Nodes) -> Nodes:
    parents = {node.parent for node in nodes}
    return [node for node in nodes if node.id not in parents]


def put(nodes: Nodes, *changed: Node) -> Nodes:
    by_id = {node.id: node for node in changed}
    return [by_id.get(node.id, node) for node in nodes]


def on(pick: Callable[[Nodes], Node], **changes: Callable[[Node], Any]) -> Callable[[Nodes], Nodes]:
    """A fault in fields of one node."""

    def plant(nodes: Nodes) -> Nodes:
        node = pick(nodes)
        return put(nodes, with_(node, **{name: change(node) for name, change in changes.items()}))

    return plant


def ended(nodes: Nodes) -> Node:
    """A leaf with an end token."""
    return next(leaf for leaf in leaves(nodes) if leaf.finish_reason is FinishReason.STOP)


def first(nodes: Nodes) -> Node:
    return nodes[1]


def longer(node: Node, token: int) -> dict[str, Any]:
    return {
        "token_ids": [*node.token_ids, token],
        "logprobs": [*(node.logprobs or []), -0.1],
        "versions": [(0, len(node.token_ids) + 1)],
    }


def extra(pick: Callable[[Nodes], Node], token: int) -> Callable[[Nodes], Nodes]:
    return lambda nodes: put(nodes, with_(pick(nodes), **longer(pick(nodes), token)))


def boundary_moved(nodes: Nodes) -> Nodes:
    """The first token of a chain's second segment goes to its first one; the response stays the same."""
    second = next(n for n in nodes if n.depth == 2 and n.role is Role.SEGMENT)
    one = nodes[second.parent or 0]
    fields = ("token_ids", "logprobs")
    whole = {name: [*getattr(one, name), *getattr(second, name)] for name in fields}
    at = len(one.token_ids) + 1
    return put(
        nodes,
        with_(one, versions=[(0, at)], **{name: whole[name][:at] for name in fields}),
        with_(second, versions=[(0, len(second.token_ids) - 1)],
              **{name: whole[name][at:] for name in fields}),
    )  # fmt: skip


def rollout_lost(nodes: Nodes) -> Nodes:
    lost = next(node.id for node in nodes if node.role is Role.ROLLOUT)
    down = lambda i: i if i is None or i < lost else i - 1  # noqa: E731
    return [with_(n, id=down(n.id), parent=down(n.parent)) for n in nodes if n.id != lost]


def exchanged(nodes: Nodes, *fields: str) -> Nodes:
    """Two nodes of depth 2 that both branch trade fields; what is below them stays."""
    parents = {node.parent for node in nodes}
    one, *others = [node for node in nodes if node.depth == 2 and node.id in parents]
    two = next(node for node in others if node.token_ids != one.token_ids)
    return put(
        nodes,
        with_(one, **{name: getattr(two, name) for name in fields}),
        with_(two, **{name: getattr(one, name) for name in fields}),
    )


SEEN: dict[str, tuple[int, Callable[[Nodes], Nodes]]] = {
    "a wrong value": (TREE, on(first, value=lambda n: n.value + 0.25)),
    "a wrong value of the prompt": (TREE, on(lambda nodes: nodes[0], value=lambda n: n.value + 1e-6)),
    "a wrong reward": (TREE, on(ended, reward=lambda n: 1.0 - n.reward, value=lambda n: 1.0 - n.reward)),
    "a reward error": (TREE, on(ended, reward_error=lambda n: "ValueError")),
    "a reward that is not at a leaf": (TREE, on(first, reward=lambda n: 1.0)),
    "an extra token behind the end": (TREE, extra(ended, 9)),
    "an extra token in a segment": (TREE, extra(first, 9)),
    "a token that is missing": (TREE, on(first, token_ids=lambda n: n.token_ids[:-1])),
    "a logprob above 0": (TREE, on(first, logprobs=lambda n: [0.1, *n.logprobs[1:]])),
    "a logprob that is no number": (TREE, on(first, logprobs=lambda n: [math.nan, *n.logprobs[1:]])),
    "another finish reason": (TREE, on(ended, finish_reason=lambda n: FinishReason.LENGTH)),
    "a version that never was": (TREE, on(first, versions=lambda n: [(1, len(n.token_ids))])),
    "versions of fewer tokens": (TREE, on(first, versions=lambda n: [(0, 1)])),
    "another prompt": (TREE, on(lambda nodes: nodes[0], token_ids=lambda n: n.token_ids[1:])),
    "another text": (TREE, on(ended, text=lambda n: n.text + " ")),
    "a leaf that is missing": (TREE, lambda nodes: nodes[:-1]),
    "a wrong depth": (TREE, on(ended, depth=lambda n: n.depth + 1)),
    "a wrong id": (TREE, lambda nodes: [*nodes[:-1], with_(nodes[-1], id=nodes[-1].id + 1)]),
    "a parent elsewhere": (TREE, on(lambda nodes: nodes[-1], parent=lambda n: 1)),
    "children below another parent": (TREE, lambda nodes: exchanged(nodes, "token_ids", "logprobs")),
    "a boundary one token off": (CHAIN, boundary_moved),
    "a rollout that is missing": (CHAIN, rollout_lost),
    "a rollout's reward": (CHAIN, on(
        lambda nodes: next(n for n in nodes if n.role is Role.ROLLOUT and n.finish_reason is FinishReason.STOP),
        reward=lambda n: 1.0 - n.reward, value=lambda n: 1.0 - n.reward)),
    "a group's sample that is missing": (GROUP, lambda nodes: nodes[:-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_planted_fault_is_found(real: Real, name: str) -> None:
    number, plant = SEEN[name]
    request, tree = real.trees[number]
    assert faults(request, tree.model_copy(update={"nodes": plant(tree.nodes)}), real.truth)


@pytest.mark.parametrize("field", ["prompt_tokens", "sampled_tokens", "cached_tokens"])
def test_usage_that_does_not_add_up_is_found(real: Real, field: str) -> None:
    for request, tree in real.trees.values():
        usage = tree.usage.model_copy(update={field: getattr(tree.usage, field) + 1})
        assert faults(request, tree.model_copy(update={"usage": usage}), real.truth)


LOOKS_RIGHT: dict[str, Callable[[Nodes], Nodes]] = {
    "a logprob a little off": on(ended, logprobs=lambda n: [*n.logprobs[:-1], n.logprobs[-1] - 0.003]),
    "another token": on(ended, token_ids=lambda n: [n.token_ids[0] ^ 1, *n.token_ids[1:]]),
    "another parent's tokens": lambda nodes: exchanged(nodes, "token_ids", "logprobs", "text"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKS_RIGHT)
def test_what_only_the_model_can_tell_is_found_by_a_plain_pass(real: Real, name: str) -> None:
    request, tree = real.trees[TREE]
    planted = tree.model_copy(update={"nodes": LOOKS_RIGHT[name](tree.nodes)})
    # A copy keeps what the tree has worked out of its nodes.
    assert real.plain.faults(request, RolloutTreeResponse.model_construct(**dict(planted)))


def test_the_checking_process_writes_wrong_trees_out(
    real: Real, tiny_math: Path, tmp_path: Path
) -> None:
    setup = Setup(
        model=tiny_math, context=512, ends=frozenset({1}), share=1.0, out=tmp_path, seed=1
    )
    request, tree = real.trees[GROUP]
    wrong = tree.model_copy(update={"nodes": SEEN["a wrong value"][1](tree.nodes)})
    body = request.model_dump(mode="json", exclude_none=True)
    named, other = {"request_id": "two"}, real.trees[5][1]
    answers = [
        (body, tree, MediaType.JSON),
        (body, wrong, MediaType.MSGPACK),
        (body | named, tree.model_copy(update=named), MediaType.JSON),
        (body | named, other.model_copy(update=named), MediaType.JSON),
    ]
    with contextlib.closing(Checker(setup)) as checker:
        for number, (asked, answer, media) in enumerate(answers):
            checker.put(Answer(number, asked, media, "", encode(answer, media)))
        checker.put(
            Answer(4, body, MediaType.NDJSON, "", b"".join(line.encode() for line in lines(tree)))
        )
        checker.put(Answer(5, body, MediaType.NDJSON, "", next(lines(tree)).encode()))
        found = checker.finish(timeout_s=60)
    assert found.wrong == 3
    assert found.compared == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "wrong-1.json", "wrong-1.bin", "wrong-3.json", "wrong-5.json"
    }  # fmt: skip
    assert "value" in json.loads((tmp_path / "wrong-1.json").read_text())["faults"][0]
    assert any("two different trees" in fault for fault in json.loads(
        (tmp_path / "wrong-3.json").read_text())["faults"])  # fmt: skip
    assert "before its last line" in found.faults[-1]
