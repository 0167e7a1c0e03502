"""What a packed batch means. Change a number here only with the design.

1.  A row's tokens are the prompt and a whole path below it, exactly as they were sampled.
2.  Every token of every selected segment trains in exactly one row; nothing else trains.
3.  There is one row for each selected segment with no selected one below it, and each row trains something.
4.  A selected ancestor rides in the first row that has it.
5.  Response, advantages, behaviour logprobs and versions stand at the position of their token; 0 elsewhere.
6.  A token takes part if its behaviour probability is strictly below the threshold; without one all do.
7.  Trees are told apart by identity, also where they have the same name and tokens.
8.  Segments without tokens are left out; one given twice, without logprobs, or without a prompt is an error.
9.  Micro-batches hold every row once, keep to the budget, padding counted, and are no more than in given order.
10. Collating pads on the right; padding trains nothing.
11. Optimizer batches hold every segment once, whole trees, of about equal tokens, the same for a seed.
12. Without segments there are no rows and no batches.
"""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.packing import (
    NO_VERSION,
    collate,
    micro_batches,
    optimizer_batches,
    participating_tokens,
    rows,
)


@st.composite
def selections(draw, max_trees=3):
    """Segments of up to three random trees, in random order."""
    chosen = []
    for _ in range(draw(st.integers(1, max_trees))):
        tree = draw(naive.trees())
        for node in tree.nodes[1:]:
            if draw(st.booleans()):
                advantage = draw(st.floats(-1, 1))
                chosen.append(Segment(tree=tree, node_id=node.id, advantage=advantage))
    return draw(st.permutations(chosen))


def wide_tree(counts, request_id="q"):
    return naive.make_tree([0] * len(counts), counts, [1.0] * len(counts), request_id=request_id)


def all_segments(tree):
    return [Segment(tree=tree, node_id=node.id, advantage=0.1 * node.id) for node in tree.nodes[1:]]


def naive_tokens(segment, threshold):
    """(path, advantage, logprob, version, takes part) of each of the segment's tokens."""
    tree, node = segment.tree, segment.node
    before, at = [], node
    while at.parent is not None:
        at = tree.nodes[at.parent]
        before = at.token_ids + before
    for i, logprob in enumerate(node.logprobs):
        path = (*before, *node.token_ids[: i + 1])
        takes_part = threshold is None or logprob < math.log(threshold)
        yield path, segment.advantage, logprob, node.versions[0][0], takes_part


def trained(row):
    for t in range(len(row)):
        if row.response[t]:
            yield (
                tuple(row.token_ids[: t + 1].tolist()),
                row.advantages[t],
                row.behaviour_logprobs[t],
                row.versions[t],
                row.participates[t],
            )


@naive.examples
@given(selections(), st.sampled_from([None, 0.9, 0.3]))
def test_1_2_5_6_every_selected_token_trains_once_with_what_belongs_to_it(segments, threshold):
    packed = rows(segments, mask_threshold=threshold)
    ours = sorted(token for row in packed for token in trained(row))
    expected = sorted(token for segment in segments for token in naive_tokens(segment, threshold))
    assert ours == expected
    assert participating_tokens(packed) == sum(takes_part for *_, takes_part in expected)


@naive.examples
@given(selections())
def test_1_rows_are_whole_paths(segments):
    paths = {
        tuple(s.tree.prompt_token_ids + s.tree.response_token_ids(s.node_id)) for s in segments
    }
    for row in rows(segments, mask_threshold=None):
        assert tuple(row.token_ids.tolist()) in paths


@naive.examples
@given(selections())
def test_3_one_row_for_each_deepest_segment(segments):
    def above(segment):
        at = segment.node
        while at.parent:
            at = segment.tree.nodes[at.parent]
            yield (id(segment.tree), at.id)

    full = [segment for segment in segments if segment.node.token_ids]
    covered = {place for segment in full for place in above(segment)}
    deepest = [s for s in full if (id(s.tree), s.node_id) not in covered]
    packed = rows(segments, mask_threshold=0.9)
    assert len(packed) == len(deepest)
    assert all(row.response.any() for row in packed)


@naive.examples
@given(selections())
def test_5_nothing_stands_where_nothing_trains(segments):
    for row in rows(segments, mask_threshold=0.9):
        outside = ~row.response
        assert not row.advantages[outside].any()
        assert not row.behaviour_logprobs[outside].any()
        assert not row.participates[outside].any()
        assert not row.response[:3].any(), "the prompt"
        assert (row.versions[:3] == NO_VERSION).all()
        assert (row.versions[3:] == 3).all(), "context has its versions too"


def test_4_an_ancestor_rides_in_the_first_row_that_has_it():
    tree = naive.make_tree([0, 1, 2, 2, 1], [2, 1, 1, 1, 1], [0, 0, 1.0, 0.0, 1.0])
    packed = rows(reversed(all_segments(tree)), mask_threshold=None)
    assert [row.response.sum() for row in packed] == [4, 1, 1]
    assert [row.advantages[3:].round(1).tolist() for row in packed] == [
        [0.1, 0.1, 0.2, 0.3],
        [0, 0, 0, 0.4],
        [0, 0, 0.5],
    ]


def test_4_a_node_that_is_not_selected_is_context():
    tree = naive.make_tree([0, 1, 2], [2, 1, 1], [0, 0, 1.0])
    segments = [s for s in all_segments(tree) if s.node_id != 2]
    (row,) = rows(segments, mask_threshold=None)
    assert row.response.tolist() == [False] * 3 + [True, True, False, True]


def test_6_exactly_the_threshold_stays_out():
    tree = naive.make_tree([0], [3], [1.0], logprobs=[[math.log(0.9), math.log(0.89), 0.0]])
    (row,) = rows(all_segments(tree), mask_threshold=0.9)
    assert row.participates.tolist() == [False] * 3 + [False, True, False]
    (row,) = rows(all_segments(tree), mask_threshold=None)
    assert row.participates.tolist() == [False] * 3 + [True] * 3


def test_7_twins_by_name_are_two_trees():
    segments = all_segments(wide_tree([2])) + all_segments(wide_tree([2]))
    assert segments[0].id == segments[1].id
    assert [row.response.sum() for row in rows(segments, mask_threshold=None)] == [2, 2]


def test_8_what_cannot_be_packed():
    tree = naive.make_tree([0, 1], [2, 0], [0, 1.0])
    (row,) = rows(all_segments(tree), mask_threshold=None)
    assert len(row) == 5
    with pytest.raises(ValueError, match="segment q/1 is given twice"):
        rows(all_segments(tree)[:1] * 2, mask_threshold=None)
    bare = tree.model_copy(
        update={"nodes": [tree.nodes[0], tree.nodes[1].model_copy(update={"logprobs": None})]}
    )
    with pytest.raises(ValueError, match="segment q/1 has no behaviour logprobs"):
        rows([Segment(tree=bare, node_id=1, advantage=1.0)], mask_threshold=None)
    headless = naive.make_tree([0], [2], [1.0], prompt=())
    with pytest.raises(ValueError, match="tree 'q' has no prompt tokens"):
        rows(all_segments(headless), mask_threshold=None)


@naive.examples
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 200))
def test_9_micro_batches_keep_to_the_budget(counts, budget):
    packed = rows(all_segments(wide_tree(counts)), mask_threshold=None)
    cut = micro_batches(packed, token_budget=budget)
    assert sorted(id(row) for micro in cut for row in micro) == sorted(map(id, packed))

    def cost(micro):
        return len(micro) * max(len(row) for row in micro)

    assert all(cost(micro) <= budget or len(micro) == 1 for micro in cut)
    in_order = []
    for row in packed:
        if in_order and cost([*in_order[-1], row]) <= budget:
            in_order[-1].append(row)
        else:
            in_order.append([row])
    assert len(cut) <= len(in_order)


def test_10_padding_is_on_the_right_and_trains_nothing():
    packed = rows(all_segments(wide_tree([1, 3])), mask_threshold=None)
    batch = collate(packed, 99, "cpu")
    first, second = (row.token_ids.tolist() for row in packed)
    assert batch.token_ids.tolist() == [[*first, 99, 99], second]
    assert batch.response.tolist()[0] == [False] * 3 + [True, False, False]
    assert batch.participates.tolist() == batch.response.tolist()
    assert batch.versions.tolist()[0] == [-1, -1, -1, 3, -1, -1]
    assert batch.advantages[0].tolist() == pytest.approx([0, 0, 0, 0.1, 0, 0])
    assert batch.behaviour_logprobs.dtype == batch.advantages.dtype == torch.float32
    assert batch.response.dtype == torch.bool


@naive.examples
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 4), st.integers())
def test_11_optimizer_batches_share_out_whole_trees(counts, updates, seed):
    trees = [wide_tree([count, 1], request_id=str(i)) for i, count in enumerate(counts)]
    segments = [segment for tree in trees for segment in all_segments(tree)]
    shares = optimizer_batches(segments, updates, random.Random(seed))
    assert len(shares) == min(updates, len(trees))
    found = sorted(segment.id for share in shares for segment in share)
    assert found == sorted(segment.id for segment in segments)
    homes = [{id(segment.tree) for segment in share} for share in shares]
    assert sum(map(len, homes)) == len(set().union(*homes)), "a tree is in one batch"
    loads = [sum(len(s.node.token_ids) for s in share) for share in shares]
    if len(shares) == updates:
        assert max(loads) - min(loads) <= max(counts) + 1
    again = optimizer_batches(segments, updates, random.Random(seed))
    assert [[s.id for s in share] for share in again] == [[s.id for s in share] for share in shares]


def seeded_shares(segments):
    """The trees' names in each of two batches, for several seeds."""
    return [
        [
            frozenset(s.tree.request_id for s in share)
            for share in optimizer_batches(segments, 2, random.Random(seed))
        ]
        for seed in range(8)
    ]


def test_11_the_seed_decides_which_trees_go_together():
    segments = [s for i in range(8) for s in all_segments(wide_tree([2, 2], request_id=str(i)))]
    assert len({frozenset(shares) for shares in seeded_shares(segments)}) > 1


def test_11_the_seed_decides_the_order_of_the_batches():
    """Lengths alone decide what goes together here."""
    segments = [s for n in (9, 1) for s in all_segments(wide_tree([n], request_id=str(n)))]
    assert {first for first, _ in seeded_shares(segments)} == {frozenset("1"), frozenset("9")}


def test_12_nothing_gives_nothing():
    assert rows([], mask_threshold=0.9) == []
    assert micro_batches([], token_budget=100) == []
    assert optimizer_batches([], 3, random.Random(0)) == []
    assert participating_tokens([]) == 0
    assert rows(all_segments(wide_tree([0, 0])), mask_threshold=0.9) == []
