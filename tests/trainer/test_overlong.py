"""The overlong penalty."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.overlong import penalise, taken


def test_by_hand():
    tree = naive.make_tree([0, 1, 1, 0], [4, 4, 2, 1], [None, 1.0, 1.0, 0.0])
    found = penalise(tree, limit=8, buffer=4, penalty=2.0)
    assert [node.reward for node in found.nodes[1:]] == [None, -1.0, 0.0, 0.0]
    assert penalise(tree, limit=8, buffer=0, penalty=2.0) is tree
    assert [node.reward for node in tree.nodes[1:]] == [None, 1.0, 1.0, 0.0]


@given(st.integers(0, 200), st.integers(1, 100), st.floats(0.1, 3))
def test_it_is_a_ramp(length, buffer, penalty):
    lost = taken(length, limit=100, buffer=buffer, penalty=penalty)
    assert 0 <= lost <= penalty
    if length <= 100 - buffer:
        assert lost == 0
    elif length <= 100:
        assert lost == pytest.approx(penalty * (length - 100 + buffer) / buffer)
    else:
        assert lost == penalty
