"""Asks a server for one tree from outside and checks it, with nothing but the standard library.

    python3 tests/docker/rollout.py URL [MIN_WEIGHT_VERSION]

Prints one JSON object: the server, nodes, tokens, weight versions and the value of the prompt.
"""

import json
import statistics
import sys
import urllib.error
import urllib.request
from typing import Any

BRANCH_FACTORS = [4, 2, 2]
PROMPT = "Tom has 5 apples. He buys 3 more. How many apples does Tom have?\n"


def ask(url: str, min_weight_version: int) -> dict[str, Any]:
    """One tree for PROMPT, sampled by weights of at least that version."""
    body = {
        "prompt": PROMPT,
        "plan": {"kind": "tree", "branch_factors": BRANCH_FACTORS, "segment_tokens": 25},
        "sampling": {"temperature": 1.0, "max_tokens": 150, "seed": 7},
        "reward": {"name": "gsm8k", "reference": "8"},
        "min_weight_version": min_weight_version,
    }
    request = urllib.request.Request(
        f"{url}/rollout_tree", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            tree: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}/rollout_tree answered {error.code}: {error.read().decode()}")
    return tree


def problems(tree: dict[str, Any], min_weight_version: int) -> list[str]:
    """What of the contract (parents first, spans, values, versions) the tree breaks."""
    found = []
    nodes = tree["nodes"]
    children: dict[int, list[dict[str, Any]]] = {}
    for node in nodes[1:]:
        children.setdefault(node["parent"], []).append(node)
        if node["parent"] >= node["id"]:
            found.append(f"node {node['id']} comes before its parent")
        if (
            not len(node["token_ids"])
            == len(node["logprobs"])
            == sum(n for _, n in node["versions"])
        ):
            found.append(f"node {node['id']}: tokens, logprobs and versions differ in length")
    for node in nodes:
        under = [child["value"] for child in children.get(node["id"], [])]
        expected = statistics.fmean(under) if under else node["reward"]
        if expected is None or abs(node["value"] - expected) > 1e-9:
            found.append(f"node {node['id']}: value {node['value']}, expected {expected}")
        if under and len(under) != BRANCH_FACTORS[node["depth"]]:
            found.append(f"node {node['id']}: {len(under)} children at depth {node['depth']}")
        if node["reward_error"]:
            found.append(f"node {node['id']}: {node['reward_error']}")
    if nodes[0]["parent"] is not None or not children.get(0):
        found.append("the first node is not a prompt with children")
    sampled = sum(len(node["token_ids"]) for node in nodes[1:])
    if sampled != tree["usage"]["sampled_tokens"]:
        found.append(f"{sampled} tokens in the nodes, usage says {tree['usage']['sampled_tokens']}")
    if tree["weight_versions"]["min"] < min_weight_version:
        found.append(f"weights {tree['weight_versions']}, asked for {min_weight_version} or later")
    return found


def main() -> None:
    """Asks, checks, prints; exit code 1 with what is wrong."""
    url = sys.argv[1]
    min_weight_version = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tree = ask(url, min_weight_version)
    summary = {
        "server": tree["server_id"],
        "nodes": len(tree["nodes"]),
        "sampled_tokens": tree["usage"]["sampled_tokens"],
        "versions": tree["weight_versions"],
        "value": tree["nodes"][0]["value"],
    }
    if found := problems(tree, min_weight_version):
        sys.exit("\n".join(found))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
