"""What a partition means. Change a number here only with the design.

1. Boundaries are sorted, unique, and stand before a token: from 0 to T - 1. No tokens, no boundaries.
2. Segments tile the response, none is empty, and the tokens before the first boundary are one.
3. Boundaries of a prefix are those of the whole below its length: they can be placed while decoding goes on.
4. `fixed`: one at every multiple of M. `whole`: the prompt alone.
5. `cutpoints`: before every k-th token whose probability is strictly below the threshold, from the first on; so no
   segment has more than k of them.
6. `delimiter`: the prompt, and behind each token in which an occurrence ends, wherever it began.
"""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.partition import boundaries, cutpoints, segments
from shared.wire import CutpointsPartition, DelimiterPartition, FixedPartition, WholePartition
from tests.numerics.naive import examples

probabilities = st.one_of(
    st.sampled_from([0.9, 0.5, 1.0, 1e-300]), st.floats(0.0, 1.0, exclude_min=True)
)
responses = st.lists(
    st.tuples(probabilities, st.text("ab\n", max_size=4)), max_size=30
)  # (probability, piece) of each token
partitions = st.one_of(
    st.builds(FixedPartition, tokens=st.integers(1, 12)),
    st.builds(
        CutpointsPartition,
        threshold=st.one_of(st.sampled_from([0.9, 1.0]), st.floats(1e-6, 1.0)),
        interval=st.integers(1, 6),
    ),
    st.builds(DelimiterPartition, delimiter=st.text("ab\n", min_size=1, max_size=3)),
    st.just(WholePartition()),
)


def place(partition, response):
    return boundaries(partition, [math.log(p) for p, _ in response], [text for _, text in response])


@examples
@given(partitions, responses)
def test_1_boundaries_are_positions_before_a_token(partition, response):
    found = place(partition, response)
    assert found == sorted(set(found))
    assert all(0 <= b < len(response) for b in found)


@examples
@given(partitions, responses)
def test_2_segments_tile_the_response(partition, response):
    found = place(partition, response)
    spans = segments(found, len(response))
    assert [t for start, end in spans for t in range(start, end)] == list(range(len(response)))
    assert all(start < end for start, end in spans)
    assert [start for start, _ in spans if start] == [b for b in found if b]


@examples
@given(partitions, responses)
def test_3_boundaries_can_be_placed_while_a_response_grows(partition, response):
    whole = place(partition, response)
    for length in range(len(response)):
        assert place(partition, response[:length]) == [b for b in whole if b < length]


@examples
@given(responses, st.integers(1, 12))
def test_4_fixed_and_whole(response, tokens):
    length = len(response)
    expected = [b for b in range(length) if b % tokens == 0]
    assert place(FixedPartition(tokens=tokens), response) == expected
    assert place(WholePartition(), response) == ([0] if length else [])


@examples
@given(responses, st.floats(1e-6, 1.0), st.integers(1, 6))
def test_5_a_segment_begins_at_a_cutpoint_and_has_at_most_k(response, threshold, interval):
    partition = CutpointsPartition(threshold=threshold, interval=interval)
    unsure = [t for t, (p, _) in enumerate(response) if math.log(p) < math.log(threshold)]
    found = place(partition, response)
    assert found == [t for nth, t in enumerate(unsure) if nth % interval == 0]
    counts = [
        sum(start <= t < end for t in unsure) for start, end in segments(found, len(response))
    ]
    assert max(counts, default=0) <= interval
    assert all(count == interval for count in counts[1:-1])


def test_5_a_probability_of_exactly_the_threshold_is_no_cutpoint():
    for threshold in (0.1, 0.3, 0.7, 0.9, 1.0):
        assert cutpoints([math.log(threshold)], threshold) == []


def test_5_the_authors_cutpoints(golden):
    cases = json.loads((golden / "chain_cutpoints_advantages.json").read_text())["cases"]
    for case in cases:
        partition = CutpointsPartition(threshold=0.9, interval=case["cutpoint_interval"])
        found = boundaries(partition, [math.log(p) for p in case["probs"]])
        assert found == case["mc_prefix_token_counts"], case["name"]


@examples
@given(responses, st.text("ab\n", min_size=1, max_size=3))
def test_6_a_boundary_stands_behind_each_occurrence(response, delimiter):
    # Token by token: cut off what an occurrence has used up, and see in which token the next one is complete.
    expected, seen = [0], ""
    for t, (_, piece) in enumerate(response):
        seen += piece
        if delimiter in seen:
            expected.append(t + 1)
            seen = seen.split(delimiter)[-1]
    expected = [b for b in expected if b < len(response)]
    assert place(DelimiterPartition(delimiter=delimiter), response) == expected


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        (["\n"], [0]),
        (["\n", "a"], [0, 1]),
        (["a\n\nb", "c"], [0, 1]),
        (["a", "", "\n", "", "b"], [0, 3]),
    ],
)
def test_6_examples(pieces, expected):
    assert boundaries(DelimiterPartition(), [-1.0] * len(pieces), pieces) == expected
