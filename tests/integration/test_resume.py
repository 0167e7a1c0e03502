"""A server dies in the middle of a tree: another one grows the rest, and samples nothing again.

Two real servers; the first is killed, told to stop without time to drain, or stopped so that it hangs, when it has
told of some nodes. The tree is to be the one that nothing happened to, and the second server's own count of
sampled tokens that of the nodes that were missing.
"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support import ServerProcess, running_server

from shared.tree import Node
from shared.wire import Reward, RolloutTreeRequest, Sampling, TreePlan
from trainer.client import Client, NodeLine, Target, attempt

START = ("--engine", "transformers", "--dtype", "float32", "--reward-workers", "1")
REQUEST = RolloutTreeRequest(
    prompt="Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    plan=TreePlan(branch_factors=[6, 6, 6], segment_tokens=8),
    sampling=Sampling(max_tokens=120, seed=7),
    reward=Reward(name="gsm8k", reference="17"),
)


@pytest.fixture(scope="module")
def survivor(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("survivor") / "server.log"
    with running_server(tiny_math, log, *START) as server:
        yield server


def sampled(server: ServerProcess) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(re.findall(r"^spoke_sampled_tokens_total (\S+)$", text, re.MULTILINE)[0])


def shape(nodes: list[Node]) -> list[object]:
    """All but the logprobs, which differ in their last digits with what else is in the batch."""
    return [(n.parent, n.token_ids, n.versions, n.finish_reason, n.reward, n.value) for n in nodes]


@pytest.mark.slow
@pytest.mark.parametrize("with_", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_tree_goes_on_at_another_server(
    survivor: ServerProcess,
    tiny_math: Path,
    tmp_path: Path,
    with_: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "SILENT_S", 0.5)
    monkeypatch.setattr(attempt, "LOST_S", 3.0)
    with Client(survivor.url) as client:
        whole = client.rollout_tree(REQUEST)
    before = sampled(survivor)
    with running_server(tiny_math, tmp_path / "log", *START, "--drain", "0") as dies:
        told: dict[str, NodeLine] = {}

        def on_node(node: NodeLine) -> None:
            if len(told) == 40:
                dies.process.send_signal(with_)
            told.setdefault(node.key, node)

        async def in_order() -> list[Target]:
            return [Target(url=dies.url), Target(url=survivor.url, load=99)]

        with Client(in_order, affinity_slack=0, timeout_s=120) as client:
            resumed = client.rollout_tree(REQUEST, on_node=on_node)
        dies.process.kill()
    assert shape(resumed.nodes) == shape(whole.nodes)
    assert resumed.usage.given_tokens > 0
    every = sum(len(node.token_ids) for node in resumed.nodes[1:])
    assert resumed.usage.given_tokens + resumed.usage.sampled_tokens == every
    assert sampled(survivor) - before == resumed.usage.sampled_tokens < every
