"""Streams of different nodes never meet, whatever order nodes finish in."""

from hypothesis import given
from hypothesis import strategies as st

from server.seeds import SAMPLES, node_seed, state_seed

paths = st.lists(st.integers(0, 63), max_size=6)
seeds = st.integers(0, 2**62)


@given(seeds, paths)
def test_seeds_are_spaced_and_fit_an_engine(seed: int, path: list[int]) -> None:
    made = node_seed(seed, path)
    assert made == node_seed(seed, path)
    assert made % SAMPLES == 0
    assert 0 <= made < 2**62


@given(seeds, paths, paths)
def test_other_nodes_have_other_streams(seed: int, one: list[int], other: list[int]) -> None:
    assert (node_seed(seed, one) == node_seed(seed, other)) == (one == other)


@given(seeds, paths, paths)
def test_rollouts_from_a_state_have_streams_of_their_own(
    seed: int, state: list[int], other: list[int]
) -> None:
    made = state_seed(seed, state)
    assert (state_seed(seed, other) == made) == (state == other)
    assert node_seed(seed, state) != made != node_seed(seed, other)
    assert made % SAMPLES == 0
    assert 0 <= made < 2**62


def test_a_whole_tree_shares_no_stream() -> None:
    paths = [()] + [(a,) for a in range(6)] + [(a, b) for a in range(6) for b in range(6)]
    streams = {node_seed(1, path) + sample for path in paths for sample in range(6)}
    assert len(streams) == 6 * len(paths)
