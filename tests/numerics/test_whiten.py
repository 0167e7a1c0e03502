"""Whitening against a loop, over whole optimizer batches, and on every degenerate input; the mask too."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.mask import participates
from trainer.packing import rows
from trainer.whiten import whiten, whiten_rows

tokens = st.lists(
    st.tuples(st.one_of(st.just(0.1), st.floats(-5, 5)), st.booleans(), st.booleans()), max_size=20
)


@naive.examples
@given(tokens)
def test_it_is_the_loop_and_finite_on_anything(entries):
    """Counted are the participating tokens; where there are none, all response tokens."""
    values = [value for value, _, _ in entries]
    response = [r for _, r, _ in entries]
    mask = [r and p for _, r, p in entries]
    ours = whiten(np.array(values), np.array(mask, bool), np.array(response, bool))
    expected = naive.whiten(values, mask if any(mask) else response)
    assert np.isfinite(ours).all()
    # A spread of zero multiplies rounding by 1e4.
    assert ours.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@naive.examples
@given(tokens.filter(lambda entries: len({v for v, _, p in entries if p}) > 1))
def test_what_is_counted_has_mean_zero_and_keeps_its_order(entries):
    values, _, mask = (np.array(column) for column in zip(*entries, strict=True))
    ours = whiten(values, mask)[mask]
    assert ours.mean() == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(ours[np.argsort(values[mask])]) >= 0).all()


def test_rows_are_whitened_together():
    """Row by row the whitening would give each row mean 0: all positive advantages would push half down."""
    trees = [naive.make_tree([0], [2], [1.0]) for _ in range(2)]
    segments = [
        Segment(tree=t, node_id=1, advantage=a) for t, a in zip(trees, (0.5, 1.5), strict=True)
    ]
    first, second = whiten_rows(rows(segments, mask_threshold=0.9))
    spread = math.sqrt(np.var([0.5, 0.5, 1.5, 1.5], ddof=1) + 1e-8)
    assert first.advantages.tolist() == pytest.approx([0, 0, 0, -0.5 / spread, -0.5 / spread])
    assert second.advantages.tolist() == pytest.approx([0, 0, 0, 0.5 / spread, 0.5 / spread])
    assert whiten_rows([]) == []


@naive.examples
@given(st.lists(st.tuples(st.booleans(), st.floats(-5, 0)), min_size=1), st.floats(0.01, 1))
def test_numpy_and_torch_have_the_same_mask(entries, threshold):
    response, logprobs = (np.array(column) for column in zip(*entries, strict=True))
    ours = participates(response, logprobs, threshold)
    theirs = participates(torch.from_numpy(response), torch.from_numpy(logprobs), threshold)
    loop = [r and p < math.log(threshold) for r, p in entries]
    assert ours.tolist() == theirs.tolist() == loop


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_a_probability_of_exactly_the_threshold_stays_out(dtype, threshold):
    logprobs = np.array([math.log(threshold), math.log(threshold) - 1e-4], dtype)
    assert participates(np.array([True, True]), logprobs, threshold).tolist() == [False, True]
    assert participates(np.array([True, False]), logprobs, None).tolist() == [True, False]
