"""What an advantage means. Change a number here only with the design.

1.  spo_tree: A = V(node) - V(parent), V(parent) including the node itself.
2.  normalised: the same over the population standard deviation of the siblings' values + 1e-8. unbiased: the
    difference over (siblings - 1) times the branch factors above the parent.
3.  Advantages of siblings add up to 0, so do those of an only child: A = 0.
4.  Along a path the differences add up to the leaf's reward less the prompt's value.
5.  grpo: (r - mean) / (population std + 1e-8); rloo: r - mean of the others, r itself where there are none.
6.  Segments with |A| < 1e-9 are dropped, by a switch; rounding never makes an advantage, also normalised.
7.  Segments without tokens are dropped whatever the switch; their reward still counts.
8.  An aborted leaf is missing data: no segment, and in no mean; so is a node whose leaves were all aborted.
9.  A failed reward counts as what the server put there.
10. grpo and rloo take whole responses: an unbranched path shares its leaf's advantage, a branched one is refused.
11. Trees with Monte Carlo rollouts are refused by spo_tree, grpo and rloo: values are means over those alone.
12. A leaf without a reward is an error. A tree without children gives nothing.
13. Settings: unknown keys, names and thresholds are errors; every name has its algorithm.
14. Nothing is ever NaN.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import TreeError
from shared.tree import RolloutTree
from tests.numerics import naive
from trainer.algorithms import ALGORITHMS, AlgorithmName, AlgorithmSettings, advantages

FLAT = [AlgorithmName.SPO_TREE, AlgorithmName.GRPO, AlgorithmName.RLOO]
"""Those that read whole responses without rollouts; chains are in test_chains.py, ppo in numerics/test_ppo.py."""
ALL = [AlgorithmSettings(name=name) for name in FLAT]
GROUPS = [s for s in ALL if s.name is not AlgorithmName.SPO_TREE]
rewards = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 0.1]), st.floats(-2, 2)), min_size=1, max_size=8
)


def settings(name="spo_tree", **options):
    return AlgorithmSettings(name=name, **({"drop_zero": False} | options))


def by_node(tree, chosen):
    return {segment.node_id: segment.advantage for segment in advantages(tree, chosen)}


@pytest.mark.parametrize("kind", ["difference", "normalised"])
def test_1_2_tree_advantages_are_the_twins(kind):
    @naive.examples
    @given(naive.trees())
    def check(tree):
        normalised = kind == "normalised"
        expected = {
            node.id: naive.tree_advantage(tree, node.id, normalised=normalised)
            for node in tree.nodes[1:]
            if node.token_ids
        }
        # Siblings that differ by rounding alone are divided by as little: only 1e-6 of the quotient is sure.
        assert by_node(tree, settings(advantage=kind)) == pytest.approx(
            expected, rel=1e-6, abs=1e-9
        )

    check()


def test_2_unbiased_by_hand():
    """4-2: at the prompt over 3; below it over 1 x 4. An aborted sibling is no sibling."""
    parents, rewards = [0, 1, 1, 0, 0, 0], [None, 1.0, 0.0, 1.0, 0.0, 0.0]
    tree = naive.make_tree(parents, [1] * 6, rewards)
    found = by_node(tree, settings(advantage="unbiased"))
    mean = 1.5 / 4
    assert found == pytest.approx(
        {
            1: (0.5 - mean) / 3,
            2: 0.5 / 4,
            3: -0.5 / 4,
            4: (1 - mean) / 3,
            5: -mean / 3,
            6: -mean / 3,
        }
    )
    cut = naive.make_tree([*parents, 0], [1] * 7, [*rewards, None], finish=[*["stop"] * 6, "abort"])
    assert by_node(cut, settings(advantage="unbiased")) == found
    assert by_node(naive.make_tree([0], [1], [1.0]), settings(advantage="unbiased")) == {1: 0.0}


@naive.examples
@given(naive.trees())
def test_3_siblings_add_up_to_zero(tree):
    full = naive.make_tree(
        [node.parent for node in tree.nodes[1:]],
        [1] * (len(tree.nodes) - 1),
        [node.reward for node in tree.nodes[1:]],
    )
    found = by_node(full, settings())
    for children in full.children:
        assert sum(found[child] for child in children) == pytest.approx(0.0, abs=1e-12)


@naive.examples
@given(naive.trees())
def test_4_a_path_adds_up_to_its_reward_less_the_prompts_value(tree):
    found = by_node(tree, settings())
    for leaf in tree.leaves():
        path = tree.path(leaf.id)
        if all(node.token_ids for node in path):
            gain = leaf.reward - naive.value(tree, 0)
            assert sum(found[node.id] for node in path) == pytest.approx(gain, abs=1e-12)


@naive.examples
@given(rewards)
def test_5_group_advantages_are_the_twins(scores):
    tree = naive.make_tree([0] * len(scores), [2] * len(scores), scores)
    for name, twin in (("grpo", naive.grpo), ("rloo", naive.rloo)):
        ours = list(by_node(tree, settings(name)).values())
        assert ours == pytest.approx(twin(scores), rel=1e-6, abs=1e-9)


def test_5_one_response_alone():
    tree = naive.make_tree([0], [2], [1.0])
    assert by_node(tree, settings("grpo")) == {1: 0.0}
    assert by_node(tree, settings("rloo")) == {1: 1.0}


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("kind", ["difference", "normalised"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1.0, 1e6 + 0.1])
def test_6_equal_rewards_leave_nothing(name, kind, reward):
    """0.1 + 0.1 + 0.1 is not 0.3, and that over a spread of zero is not nothing."""
    if reward > 1 and kind == "difference":
        reward = 3.0
    for size in (1, 3, 7):
        if name == "rloo" and size == 1:
            continue
        tree = naive.make_tree([0] * size, [1] * size, [reward] * size)
        assert by_node(tree, settings(name, advantage=kind, drop_zero=True)) == {}
        assert all(abs(a) < 1e-9 for a in by_node(tree, settings(name, advantage=kind)).values())


def test_6_what_is_not_zero_stays():
    tree = naive.make_tree([0, 0], [1, 1], [0.0, 4e-9])
    assert by_node(tree, settings(drop_zero=True)) == pytest.approx({1: -2e-9, 2: 2e-9})
    tree = naive.make_tree([0, 0], [1, 1], [0.0, 1e-9])
    assert by_node(tree, settings(drop_zero=True)) == {}


@pytest.mark.parametrize("chosen", ALL, ids=lambda chosen: chosen.name)
def test_7_a_node_without_tokens_counts_and_does_not_train(chosen):
    tree = naive.make_tree([0, 0], [0, 2], [1.0, 0.0])
    for one in (chosen, chosen.model_copy(update={"drop_zero": False})):
        (segment,) = advantages(tree, one)
        assert segment.node_id == 2
        assert segment.advantage < 0
        assert segment.id == "q/2"


@pytest.mark.parametrize("chosen", ALL, ids=lambda chosen: chosen.name)
def test_8_an_aborted_response_is_missing(chosen):
    whole = naive.make_tree([0, 0], [2, 2], [1.0, 0.0])
    cut = naive.make_tree(
        [0, 0, 0], [2, 2, 2], [1.0, 0.0, None], finish=["stop", "length", "abort"]
    )
    assert by_node(cut, chosen) == by_node(whole, chosen)
    gone = naive.make_tree([0, 0], [2, 2], [0.0, None], finish=["abort", "abort"])
    assert advantages(gone, chosen) == []


def test_8_a_node_whose_leaves_were_all_aborted_is_missing():
    tree = naive.make_tree(
        [0, 0, 1, 1, 0],
        [1] * 5,
        [None, 1.0, None, 0.0, 0.0],
        finish=["length", "stop", "abort", "abort", "stop"],
    )
    assert by_node(tree, settings()) == {2: 0.5, 5: -0.5}
    assert by_node(tree, settings(advantage="normalised")) == pytest.approx({2: 1.0, 5: -1.0})


def test_9_a_failed_reward_counts():
    nodes = naive.make_tree([0, 0], [1, 1], [1.0, 0.0]).model_dump()["nodes"]
    nodes[2]["reward_error"] = "timeout"
    tree = RolloutTree.model_validate({"nodes": nodes})
    assert by_node(tree, settings()) == {1: 0.5, 2: -0.5}


@pytest.mark.parametrize("chosen", GROUPS, ids=lambda chosen: chosen.name)
def test_10_whole_responses(chosen):
    single = naive.make_tree([0, 0], [4, 4], [1.0, 0.0])
    pieces = naive.make_tree([0, 1, 0, 3], [2, 2, 1, 3], [None, 1.0, None, 0.0])
    good, bad = by_node(single, chosen).values()
    assert by_node(pieces, chosen) == {1: good, 2: good, 3: bad, 4: bad}
    branched = naive.make_tree([0, 1, 1], [2, 2, 2], [None, 1.0, 0.0])
    with pytest.raises(ValueError, match=r'2 responses share node 1.*"kind": "group"'):
        advantages(branched, chosen)


@pytest.mark.parametrize("chosen", ALL, ids=lambda chosen: chosen.name)
def test_11_value_rollouts_are_refused(chosen):
    nodes = naive.make_tree([0, 1], [1, 1], [None, 1.0]).model_dump()["nodes"]
    nodes[2]["role"] = "rollout"
    tree = RolloutTree.model_validate({"request_id": "q", "nodes": nodes})
    with pytest.raises(ValueError, match="tree 'q' is of a chain plan"):
        advantages(tree, chosen)


@pytest.mark.parametrize("chosen", ALL, ids=lambda chosen: chosen.name)
def test_12_rewards_are_needed_and_children_are_not(chosen):
    with pytest.raises(TreeError, match="leaf without a reward"):
        advantages(naive.make_tree([0], [1], [None]), chosen)
    assert advantages(naive.make_tree([], [], []), chosen) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "spo"},
        {"advantage": "std"},
        {"mask_threshold": 0},
        {"mask_threshold": 1.1},
        {"x": 1},
    ],
)
def test_13_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        AlgorithmSettings.model_validate(wrong)
    assert set(ALGORITHMS) == set(AlgorithmName)
    assert AlgorithmSettings(mask_threshold=None).mask_threshold is None


@naive.examples
@given(naive.trees(), naive.trees(branched=False), st.booleans())
def test_14_nothing_is_nan(tree, group, drop_zero):
    for chosen in ALL:
        one = chosen.model_copy(update={"drop_zero": drop_zero})
        given = tree if chosen.name is AlgorithmName.SPO_TREE else group
        assert all(math.isfinite(a) for a in by_node(given, one).values())
    assert all(math.isfinite(a) for a in by_node(tree, settings(advantage="normalised")).values())
