"""The client against two real servers of a real model: the examples of its page, and a server that is killed."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import ServerProcess, running_server

from shared.stream import node_keys
from shared.wire import (
    GroupPlan,
    RolloutTreeRequest,
    RolloutTreeResponse,
    Sampling,
    TreePlan,
)
from trainer.client import Client, NodeLine
from trainer.client.identity import repeatable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two_servers(
    tiny_math: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServerProcess]]:
    """By URL. One of them does not survive its test."""
    folder, engine = (
        tmp_path_factory.mktemp("two"),
        ("--engine", "transformers", "--dtype", "float32"),
    )
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running_server(tiny_math, folder / f"{i}.log", *engine))
            for i in range(2)
        ]
        yield {server.url: server for server in servers}


def test_the_examples_in_the_docs_run(
    two_servers: dict[str, ServerProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/client.md").read_text(), re.DOTALL)
    code = "\n".join(blocks)
    for said, url in zip(
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001"), two_servers, strict=True
    ):
        assert said in code
        code = code.replace(said, url)
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/client.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert 3 <= printed.count(" tokens\n") <= 6
    assert "tokens sampled" in printed
    assert sum(re.match(r"\d \S+ [01]\.", line) is not None for line in printed.splitlines()) == 8
    assert len(re.findall(r"^[\d.]* \d+ (?:stop|length|None)$", printed, re.M)) == len(
        scope["tree"].nodes
    )


def test_every_server_samples_the_same_tree_for_the_same_id(
    two_servers: dict[str, ServerProcess],
) -> None:
    """What makes a failover a retry: the seed comes from the id."""
    request = RolloutTreeRequest(
        request_id="same", prompt="Ana has 12 apples.", plan=TreePlan(branch_factors=[3, 2], segment_tokens=8)
    )  # fmt: skip
    trees = []
    for url in two_servers:
        with Client(url, reproducible=True) as client:
            trees.append(client.rollout_tree(request))
    assert trees[0].server_id != trees[1].server_id
    tokens = [[node.token_ids for node in tree.nodes] for tree in trees]
    assert tokens[0] == tokens[1]
    # What came packed is what JSON says, to the last bit.
    body = repeatable(request, seeded=True).model_dump_json(exclude_none=True)
    plain = httpx.post(
        f"{url}/rollout_tree", content=body, headers={"Content-Type": "application/json"}
    )
    assert plain.headers["content-type"] == "application/json"
    assert RolloutTreeResponse.model_validate_json(plain.content) == trees[1]


def test_a_server_killed_mid_tree_costs_no_tree(two_servers: dict[str, ServerProcess]) -> None:
    request = RolloutTreeRequest(
        request_id="long",
        prompt="Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
        plan=TreePlan(branch_factors=[8, 8, 8], segment_tokens=8),
        sampling=Sampling(max_tokens=160),
    )
    with Client(two_servers, timeout_s=120) as client:
        assert sorted(client.ready()) == sorted(two_servers)
        quick = request.model_copy(update={"request_id": "q", "plan": GroupPlan(samples=1)})
        own = client.rollout_tree(quick).server_id
        mine = next(url for url in two_servers if client.info(url)["server_id"] == own)
        seen: list[str] = []

        def on_node(node: NodeLine) -> None:
            seen.append(node.key)
            if len(seen) == 20:
                two_servers[mine].process.kill()

        answer = client.rollout_tree(request, on_node=on_node)
        keys = node_keys([node.parent for node in answer.nodes])
        # Twenty or more of the server that was killed, then every node of the other's.
        assert len(seen) >= 20 + len(keys)
        assert sorted(seen[-len(keys) :]) == sorted(keys)
        assert answer.request_id == "long"
        assert answer.server_id != own
        # A tree that was made of given nodes is kept for whoever gives the same ones, and for nobody else.
        again = client.rollout_tree(request)
        assert (again.request_id, again.usage.given_tokens) == ("long", 0)
        assert client.rollout_tree(request) == again
        assert client.ready() == [url for url in two_servers if url != mine]
