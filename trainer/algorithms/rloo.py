"""RLOO: a response's baseline is the mean reward of the others (arXiv 2402.14740).

    A_i = r_i - mean(r_j, j != i)

Edge cases: a group of one has no others, hence no baseline, and A = r (REINFORCE): the gradient stays unbiased,
where a baseline of the response's own reward would erase it. Paths, responses without tokens and aborted ones
are as in `grpo`.
"""

from shared.tree import RolloutTree
from trainer.algorithms.base import AlgorithmSettings, Segment, trainable
from trainer.algorithms.grpo import group


def rloo(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Segments of one group: the responses to one prompt."""
    responses = group(tree)
    total, others = sum(reward for _, reward in responses), len(responses) - 1
    advantages = (
        (node_id, reward - (total - reward) / others if others else reward)
        for path, reward in responses
        for node_id in path
    )
    return trainable(tree, advantages, settings)
