"""Tree and group advantages against the authors' numbers, in float64."""

import json

import pytest

from tests.numerics.naive import make_tree
from trainer.algorithms import AlgorithmSettings, advantages

EXACT = 1e-12


def load(golden, name):
    return json.loads((golden / name).read_text())["cases"]


def golden_tree(case):
    nodes = case["nodes"][1:]
    return make_tree(
        [node["parent"] for node in nodes], [1] * len(nodes), [node["reward"] for node in nodes]
    )


def test_every_value_is_the_authors(golden):
    cases = load(golden, "tree_values.json")
    assert len(cases) == 7
    for case in cases:
        for ours, theirs in zip(golden_tree(case).with_values().nodes, case["nodes"], strict=True):
            assert ours.value == pytest.approx(theirs["value"], abs=EXACT), (case["name"], ours.id)


@pytest.mark.parametrize(
    ("kind", "field"), [("difference", "advantage"), ("normalised", "advantage_normalised")]
)
def test_every_tree_advantage_is_the_authors(golden, kind, field):
    settings = AlgorithmSettings(advantage=kind, drop_zero=False)
    for case in load(golden, "tree_values.json"):
        ours = {s.node_id: s.advantage for s in advantages(golden_tree(case), settings)}
        theirs = {node["id"]: node[field] for node in case["nodes"][1:]}
        assert ours == pytest.approx(theirs, abs=EXACT), case["name"]


def test_every_group_advantage_is_the_authors(golden):
    """Population standard deviation plus 1e-8 in GRPO; in RLOO one response alone has no baseline, so A = r."""
    cases = load(golden, "group_advantages.json")
    assert len(cases) == 5
    for case in cases:
        scores = case["scores"]
        tree = make_tree([0] * len(scores), [2] * len(scores), scores)
        settings = AlgorithmSettings(name=case["method"], drop_zero=False)
        ours = [segment.advantage for segment in advantages(tree, settings)]
        assert ours == pytest.approx(case["advantages"], abs=EXACT)
