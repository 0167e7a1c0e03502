"""What an advantage means in a chain plan. Change a number here only with the design.

1. V(boundary) = mean reward of its rollouts; V(end of the response) = its reward.
2. spo_chain, vineppo: A = V(end of segment) - V(start of segment).
3. Tokens before the first boundary have A = 0, unless the prompt is a boundary.
4. An aborted rollout counts in no mean. An aborted response gives its last segment no advantage, and leaves the
   others theirs.
5. Rollouts never train.
6. vineppo needs a value at the prompt. A leaf that was not aborted needs a reward.
7. Along a response whose prompt is a boundary, advantages add up to its reward less the prompt's value.
8. Nothing is ever NaN.
"""

import json
import math

import pytest
from hypothesis import given

from shared.errors import TreeError
from shared.partition import boundaries, segments
from shared.tree import Role, RolloutTree, chain_values
from shared.wire import CutpointsPartition
from tests.numerics import naive
from trainer.algorithms import AlgorithmSettings, advantages

CHAIN = AlgorithmSettings(name="spo_chain", drop_zero=False)
VINE = AlgorithmSettings(name="vineppo", drop_zero=False)


def by_node(tree, settings):
    return {segment.node_id: segment.advantage for segment in advantages(tree, settings)}


@naive.examples
@given(naive.chains())
def test_1_values_are_the_twins(tree):
    expected = [naive.chain_value(tree, node.id) for node in tree.nodes]
    assert chain_values(tree.nodes) == pytest.approx(expected, abs=1e-12)
    assert [n.value for n in tree.with_values(chain=True).nodes] == chain_values(tree.nodes)


@naive.examples
@given(naive.chains())
def test_2_3_4_5_advantages_are_the_twins(tree):
    expected = {node.id: naive.chain_advantage(tree, node.id) for node in tree.nodes[1:]}
    known = {node_id: a for node_id, a in expected.items() if a is not None}
    assert by_node(tree, CHAIN) == pytest.approx(known, abs=1e-12)
    assert all(tree.nodes[node_id].role is Role.SEGMENT for node_id in by_node(tree, CHAIN))


@naive.examples
@given(naive.chains(prompt_rollouts=True))
def test_2_vineppo_is_the_same_difference(tree):
    assert by_node(tree, VINE) == by_node(tree, CHAIN)


@naive.examples
@given(naive.chains())
def test_5_the_switch_drops_what_is_zero_and_nothing_else(tree):
    kept = by_node(tree, AlgorithmSettings(name="spo_chain"))
    whole = by_node(tree, CHAIN)
    assert kept == {node_id: a for node_id, a in whole.items() if abs(a) >= 1e-9}


def chain(responses, prompt=()):
    """A tree from (segments' rollout rewards, reward) of each response."""
    nodes = [{"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [5]}]

    def add(parent, role, reward):
        depth = nodes[parent]["depth"] + 1
        own = {"id": len(nodes), "parent": parent, "depth": depth, "role": role, "reward": reward}
        nodes.append(own | {"token_ids": [7, 8], "logprobs": [-1.0, -1.0]})
        return own["id"]

    for reward in prompt:
        add(0, "rollout", reward)
    for rollouts, reward in responses:
        parent = 0
        for rewards in rollouts:
            parent = add(parent, "segment", None)
            for one in rewards:
                add(parent, "rollout", one)
        add(parent, "segment", reward)
    return RolloutTree.model_validate({"request_id": "q", "nodes": nodes})


def test_3_by_hand():
    tree = chain([([[1.0, 0.0], [1.0, 1.0]], 0.0)])
    assert by_node(tree, CHAIN) == {1: 0.0, 4: 0.5, 7: -1.0}
    tree = chain([([[1.0, 0.0]], 1.0), ([], 0.0)], prompt=[1.0, 0.0, 0.0, 0.0])
    assert by_node(tree, CHAIN) == {5: 0.25, 8: 0.5, 9: -0.25}


def test_6_what_is_needed():
    with pytest.raises(ValueError, match=r"the prompt has no value rollouts.*delimiter"):
        advantages(chain([([[1.0]], 1.0)]), VINE)
    for settings in (CHAIN, VINE):
        with pytest.raises(TreeError, match="node 3 is a leaf without a reward"):
            advantages(chain([([[1.0]], 1.0)], prompt=[0.0, 1.0, None]), settings)


@naive.examples
@given(naive.chains(prompt_rollouts=True))
def test_7_a_response_adds_up(tree):
    found, values = by_node(tree, CHAIN), chain_values(tree.nodes)
    for leaf in tree.leaves():
        path = tree.path(leaf.id)
        if all(node.id in found and values[node.parent] is not None for node in path):
            gain = leaf.reward - values[0]
            assert sum(found[node.id] for node in path) == pytest.approx(gain, abs=1e-9)


@naive.examples
@given(naive.chains())
def test_8_nothing_is_nan(tree):
    assert all(math.isfinite(advantage) for advantage in by_node(tree, CHAIN).values())


def test_every_advantage_is_the_authors(golden):
    """Their probabilities through our partition, one rollout for each of their values."""
    cases = json.loads((golden / "chain_cutpoints_advantages.json").read_text())["cases"]
    assert len(cases) == 9
    for case in cases:
        probabilities = case["probs"]
        logprobs = [math.log(p) for p in probabilities]
        places = boundaries(CutpointsPartition(interval=case["cutpoint_interval"]), logprobs)
        assert places == case["mc_prefix_token_counts"]
        known = dict(zip(places, case["cutpoint_values"], strict=True))
        spans = segments(places, len(probabilities))
        inner = [[known[end]] for _, end in spans[:-1]]
        prompt = [known[0]] if 0 in known else []
        found = advantages(chain([(inner, case["score"])], prompt), CHAIN)
        assert len(found) == len(spans)
        ours = [
            segment.advantage if p < 0.9 else 0
            for segment, (start, end) in zip(found, spans, strict=True)
            for p in probabilities[start:end]
        ]
        assert ours == pytest.approx(case["advantages"], abs=1e-12), case["name"]
