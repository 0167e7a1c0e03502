"""VinePPO: the advantage of a reasoning step, its values from Monte Carlo rollouts (arXiv 2410.01679, section 4).

    A(step) = V(state after the step) - V(state before it)

It is SPO-chain's difference on other boundaries: the server cuts the response after a delimiter, such as a
newline, and the prompt is always a boundary, so that every step has both values. VinePPO trains every token: set
`mask_threshold` to null. Edge cases are those of `spo_chain`; a tree in which the prompt has no rollouts is
refused, for then the first step would silently train nothing.
"""

from shared.tree import Role, RolloutTree
from trainer.algorithms.base import AlgorithmSettings, Segment, trainable
from trainer.algorithms.spo_chain import differences


def vineppo(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Steps of the responses of one chain plan whose partition is `delimiter` or `fixed`.

    Raises:
        ValueError: the prompt has no rollouts.
    """
    if not any(tree.nodes[child].role is Role.ROLLOUT for child in tree.children[0]):
        raise ValueError(
            f"tree {tree.request_id!r}: the prompt has no value rollouts; vineppo needs the plan "
            '{"kind": "chain", "partition": {"kind": "delimiter"}}'
        )
    return trainable(tree, differences(tree), settings)
