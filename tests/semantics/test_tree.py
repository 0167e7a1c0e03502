"""What a rollout tree means. Change a number here only with the design.

1.  A leaf's value is its reward; another node's is the mean of its children's values.
2.  So the prompt's value weighs each leaf by 1 / (product of the branchings on its path).
3.  Rewards at nodes with children are ignored, and so are values that came with the tree.
4.  A leaf without tokens counts like any other.
5.  A leaf without a reward is an error; a prompt without children just has no value.
6.  Nodes stand at the position of their id, parents first; anything else is refused.
7.  A node's response is the tokens of its path, the prompt left out and the node included.
8.  Leaves are the nodes without children, never the prompt.
9.  One logprob for each token, and version spans that add up to them.
"""

import pytest
from hypothesis import given
from pydantic import ValidationError

from shared.errors import TreeError
from shared.tree import RolloutTree, backup
from tests.numerics import naive


@naive.examples
@given(naive.trees())
def test_1_values_are_means_of_means(tree):
    assert [node.value for node in tree.with_values().nodes] == pytest.approx(
        [naive.value(tree, node.id) for node in tree.nodes], abs=1e-12
    )


@naive.examples
@given(naive.trees())
def test_2_the_prompts_value_weighs_leaves_by_their_branchings(tree):
    expected = 0.0
    for leaf in (node for node in tree.nodes[1:] if not tree.children[node.id]):
        weight, node = 1.0, leaf
        while node.parent is not None:
            weight /= sum(other.parent == node.parent for other in tree.nodes)
            node = tree.nodes[node.parent]
        expected += weight * leaf.reward
    assert tree.with_values().nodes[0].value == pytest.approx(expected, abs=1e-12)


def test_3_only_leaves_rewards_are_read():
    nodes = naive.make_tree([0, 1, 1], [1, 1, 1], [None, 1.0, 0.0]).model_dump()["nodes"]
    nodes[1] |= {"reward": 9.0, "value": -9.0}
    nodes[2]["value"] = 5.0
    tree = RolloutTree.model_validate({"nodes": nodes})
    assert [node.value for node in tree.with_values().nodes] == [0.5, 0.5, 1.0, 0.0]
    assert tree.nodes[1].value == -9.0, "the tree itself is not changed"


def test_4_a_leaf_without_tokens_counts():
    tree = naive.make_tree([0, 0], [0, 2], [1.0, 0.0])
    assert tree.with_values().nodes[0].value == 0.5


def test_5_a_leaf_needs_a_reward_and_a_lone_prompt_does_not():
    with pytest.raises(TreeError, match="node 2 is a leaf without a reward"):
        backup([None, 0, 0], [None, 1.0, None])
    assert backup([None], [None]) == [None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 7}, "ids are positions"),
        ({"parent": None, "depth": 0}, "has no parent"),
        ({"parent": 2}, "does not come before it"),
        ({"parent": 1, "depth": 1}, "does not come before it"),
        ({"depth": 2}, "depth is not its parent's plus one"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_6_ids_are_positions_and_parents_come_first(change, message):
    nodes = naive.make_tree([0, 0], [1, 1], [1.0, 0.0]).model_dump()["nodes"]
    nodes[1] |= change
    with pytest.raises(ValidationError, match=message):
        RolloutTree.model_validate({"nodes": nodes})


@naive.examples
@given(naive.trees())
def test_7_a_response_is_the_tokens_of_the_path(tree):
    for node in tree.nodes:
        tokens, at = [], node
        while at.parent is not None:
            tokens = at.token_ids + tokens
            at = tree.nodes[at.parent]
        assert tree.response_token_ids(node.id) == tokens
        assert [n.depth for n in tree.path(node.id)] == list(range(1, node.depth + 1))


@naive.examples
@given(naive.trees())
def test_8_leaves_have_no_children_and_are_not_the_prompt(tree):
    parents = {node.parent for node in tree.nodes}
    assert [n.id for n in tree.leaves()] == [n.id for n in tree.nodes[1:] if n.id not in parents]
    assert list(naive.make_tree([], [], []).leaves()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [-1.0]}, "1 logprobs for 2 tokens"),
        ({"versions": [[3, 1]]}, "version spans do not add up"),
    ],
)
def test_9_logprobs_and_versions_cover_the_tokens(change, message):
    nodes = naive.make_tree([0], [2], [1.0]).model_dump()["nodes"]
    nodes[1] |= change
    with pytest.raises(ValidationError, match=message):
        RolloutTree.model_validate({"nodes": nodes})
