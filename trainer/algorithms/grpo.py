"""GRPO: a response's advantage is its reward standardised within its group (arXiv 2402.03300, section 4.1.2).

    A_i = (r_i - mean(r)) / (std(r) + 1e-8)        population std

Edge cases: all rewards equal, or a group of one, give 0. A response without tokens counts in the statistics and
gives no segment; an aborted one is left out of both. A leaf's advantage goes to its whole path, so a path cut
into segments trains like one of a single node; responses that share a node are refused, for it would need
several advantages.
"""

from collections.abc import Iterator
from statistics import fmean, pstdev

from shared.tree import RolloutTree
from trainer.algorithms.base import (
    STD_EPSILON,
    AlgorithmSettings,
    Segment,
    negligible,
    trainable,
    values,
)


def grpo(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Segments of one group: the responses to one prompt."""
    responses = group(tree)
    rewards = [reward for _, reward in responses]
    mean, spread = (fmean(rewards), pstdev(rewards)) if rewards else (0.0, 0.0)
    advantages = (
        (node_id, 0.0 if negligible(reward - mean) else (reward - mean) / (spread + STD_EPSILON))
        for path, reward in responses
        for node_id in path
    )
    return trainable(tree, advantages, settings)


def group(tree: RolloutTree) -> list[tuple[list[int], float]]:
    """(node ids of the path, reward) of each response that was not aborted.

    Raises:
        ValueError: responses share a node, so the tree is not of a plan of kind "group".
    """
    return list(_responses(tree))


def _responses(tree: RolloutTree) -> Iterator[tuple[list[int], float]]:
    known = values(tree)
    for node in tree.nodes[1:]:
        if len(tree.children[node.id]) > 1:
            raise ValueError(
                f"tree {tree.request_id!r}: {len(tree.children[node.id])} responses share node {node.id}; "
                'grpo and rloo need the plan {"kind": "group"}'
            )
    for leaf in tree.leaves():
        reward = known[leaf.id]
        if reward is not None:
            yield [node.id for node in tree.path(leaf.id)], reward
