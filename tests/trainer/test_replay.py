"""Replay: each segment at most once, at most so many of a tree, never too old, the same after a checkpoint."""

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.replay import Replay


def segments(name, count):
    tree = naive.make_tree([0] * count, [1] * count, [1.0] * count, request_id=name)
    return [Segment(tree=tree, node_id=i, advantage=i / 8) for i in range(1, count + 1)]


@naive.examples
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_every_segment_trains_once_or_is_dropped_and_counted(sizes, per_question, max_age, seed):
    replay = Replay(per_question=per_question, max_age=max_age, seed=seed)
    seen, added = [], 0
    for iteration, size in enumerate([*sizes, *[0] * (max_age + 1)]):
        replay.add(segments(f"q{iteration}", size), iteration)
        added += size
        taken = replay.take(iteration)
        born = {s.id.split("/")[0] for s in taken}
        for name in born:
            mine = [s for s in taken if s.id.startswith(f"{name}/")]
            assert len(mine) <= per_question
            assert iteration - int(name[1:]) <= max_age
        seen += [s.id for s in taken]
        assert len(seen) + replay.dropped + len(replay) == added
    assert len(set(seen)) == len(seen)
    assert len(replay) == 0


def test_trees_of_one_question_share_its_share_and_the_older_goes_first():
    replay = Replay(per_question=4, max_age=8, seed=0)
    replay.add(segments("run/step-0/17", 3), 0)
    replay.add(segments("run/step-1/17", 9) + segments("run/step-1/18", 9), 1)
    taken = [s.id.rpartition("/")[0] for s in replay.take(1)]
    assert taken == ["run/step-0/17"] * 3 + ["run/step-1/17"] + ["run/step-1/18"] * 4


def test_a_segment_keeps_its_advantage_and_its_tokens():
    replay = Replay(per_question=2, max_age=8, seed=0)
    given_ones = {s.id: s for s in segments("q", 5)}
    replay.add(list(given_ones.values()), 0)
    for iteration in range(3):
        for taken in replay.take(iteration):
            assert taken.advantage == given_ones[taken.id].advantage
            assert taken.node == given_ones[taken.id].node


def test_a_restored_replay_takes_what_it_would_have_taken():
    def fresh():
        return Replay(per_question=2, max_age=4, seed=7)

    one = fresh()
    one.add(segments("a", 7) + segments("b", 3), 0)
    one.take(0)
    state = one.state()
    json.loads(state)
    other = fresh()
    other.restore(state)
    for iteration in (1, 2, 3):
        for replay in (one, other):
            replay.add(segments(f"c{iteration}", 4), iteration)
        mine, theirs = one.take(iteration), other.take(iteration)
        assert [(s.id, s.advantage, s.node) for s in mine] == [
            (s.id, s.advantage, s.node) for s in theirs
        ]
    assert one.dropped == other.dropped
    # Segments of one tree share it again, so that their prefix trains once.
    assert len({id(entry.tree) for entry in other.waiting}) == len(other.waiting)


def test_the_choice_depends_on_the_seed():
    def first(seed):
        replay = Replay(per_question=3, max_age=8, seed=seed)
        replay.add(segments("q", 20), 0)
        return [s.id for s in replay.take(0)]

    assert first(0) == first(0)
    assert len({tuple(first(seed)) for seed in range(5)}) > 1
