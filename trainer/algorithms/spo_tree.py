"""SPO-tree: the advantage of a segment is what its tokens added to the chance of success.

    V(leaf) = reward        V(node) = mean of its children's V
    A(node) = V(node) - V(parent)                                     "difference"
    A(node) = (V(node) - V(parent)) / (std of siblings' V + 1e-8)     "normalised", population std
    A(node) = (V(node) - V(parent)) * share(parent) / (m - 1)         "unbiased"; m siblings, itself included
              share(prompt) = 1        share(node) = share(parent) / m

A tree samples deeper segments more often, and V(parent) keeps 1 / m of the node's own advantage: with branch
factors 4-2-2, "difference" follows 1, 4/3 and 8/3 of the policy gradient at the three depths. "unbiased" takes
both back, at the price of more variance; it is not in the paper (`tests/benchmarks/unbiasedness.py` has both).

V(parent) includes the node itself (arXiv 2505.23564, section 4). Edge cases: a node without tokens gives no
segment but counts in its parent's mean; an aborted node gives none and counts in none (`base.values`); siblings
of equal value have A = 0 exactly, also normalised, whatever the rounding of their mean; an only child has A = 0.
"""

from collections.abc import Iterator
from statistics import pstdev

from shared.tree import RolloutTree
from trainer.algorithms.base import (
    STD_EPSILON,
    AdvantageKind,
    AlgorithmSettings,
    Segment,
    negligible,
    trainable,
    values,
)


def spo_tree(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Segments of one tree; see the module.

    >>> tree = RolloutTree.model_validate({"request_id": "q", "nodes": [
    ...     {"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [5]},
    ...     {"id": 1, "parent": 0, "depth": 1, "token_ids": [7, 8], "logprobs": [-1.0, -1.0]},
    ...     {"id": 2, "parent": 1, "depth": 2, "token_ids": [9], "logprobs": [-1.0], "reward": 1.0},
    ...     {"id": 3, "parent": 1, "depth": 2, "token_ids": [6], "logprobs": [-1.0], "reward": 0.0},
    ...     {"id": 4, "parent": 0, "depth": 1, "token_ids": [6], "logprobs": [-1.0], "reward": 1.0}]})
    >>> [(segment.id, segment.advantage) for segment in spo_tree(tree, AlgorithmSettings())]
    [('q/1', -0.25), ('q/2', 0.5), ('q/3', -0.5), ('q/4', 0.25)]
    """
    return trainable(tree, _advantages(tree, settings.advantage), settings)


def _advantages(tree: RolloutTree, kind: AdvantageKind) -> Iterator[tuple[int, float]]:
    known = values(tree)
    below = [[v for i in ids if (v := known[i]) is not None] for ids in tree.children]
    spread = [pstdev(siblings) if siblings else 0.0 for siblings in below]
    share = [1.0] * len(tree.nodes)
    for node in tree.nodes[1:]:
        assert node.parent is not None
        siblings = max(1, len(below[node.parent]))
        share[node.id] = share[node.parent] / siblings
        value, start = known[node.id], known[node.parent]
        if value is None or start is None:
            continue
        advantage = value - start
        if kind is AdvantageKind.NORMALISED:
            # Rounding of the mean over a standard deviation of zero would look like an advantage.
            noise = negligible(advantage)
            advantage = 0.0 if noise else advantage / (spread[node.parent] + STD_EPSILON)
        elif kind is AdvantageKind.UNBIASED:
            advantage *= share[node.parent] / max(1, siblings - 1)
        yield node.id, advantage
