"""The algorithms by name. A new one is a file here, a name in `base.AlgorithmName` and a line below."""

from shared.tree import RolloutTree
from trainer.algorithms.base import (
    AdvantageKind,
    Algorithm,
    AlgorithmName,
    AlgorithmSettings,
    Segment,
)
from trainer.algorithms.grpo import grpo
from trainer.algorithms.ppo import ppo
from trainer.algorithms.rloo import rloo
from trainer.algorithms.spo_chain import spo_chain
from trainer.algorithms.spo_tree import spo_tree
from trainer.algorithms.vineppo import vineppo

__all__ = [
    "ALGORITHMS",
    "AdvantageKind",
    "Algorithm",
    "AlgorithmName",
    "AlgorithmSettings",
    "Segment",
    "advantages",
]

ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    AlgorithmName.SPO_TREE: spo_tree,
    AlgorithmName.SPO_CHAIN: spo_chain,
    AlgorithmName.VINEPPO: vineppo,
    AlgorithmName.GRPO: grpo,
    AlgorithmName.RLOO: rloo,
    AlgorithmName.PPO: ppo,
}


def advantages(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Segments of one tree under the algorithm of the settings.

    Raises:
        TreeError: a leaf without a reward.
        ValueError: a tree of a plan that the algorithm is not made for.
    """
    return ALGORITHMS[settings.name](tree, settings)
