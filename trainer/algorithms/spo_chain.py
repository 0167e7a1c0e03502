"""SPO-chain: values at the boundaries of a sampled response, each from rollouts of its own.

    V(boundary) = mean reward of N independent rollouts from it        V(end of the response) = its reward
    A(segment) = V(end of segment) - V(start of segment)

With cutpoints the estimate is not quite unbiased: a boundary before token t is there because of token t, so V(end)
leaves out the rare token that placed it (cosine 0.998 to the exact gradient where values can be enumerated, see
`tests/benchmarks/unbiasedness.py`; fixed and delimiter boundaries are unbiased).

The boundaries are the server's: cutpoints, a fixed length, or a delimiter (arXiv 2505.23564, section 4; DESIGN
section 4). Edge cases: a segment that starts where there is no estimate (the tokens before the first boundary,
unless the prompt is one) has A = 0; an aborted rollout counts in no mean; an aborted response has no reward, so
its last segment has no advantage, while the segments before it keep theirs.
"""

from collections.abc import Iterator

from shared.errors import TreeError
from shared.tree import FinishReason, Role, RolloutTree, chain_values
from trainer.algorithms.base import AlgorithmSettings, Segment, trainable


def spo_chain(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Segments of the responses of one chain plan; see the module.

    >>> tree = RolloutTree.model_validate({"request_id": "q", "nodes": [
    ...     {"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [5]},
    ...     {"id": 1, "parent": 0, "depth": 1, "token_ids": [7, 8], "logprobs": [0.0, 0.0]},
    ...     {"id": 2, "parent": 1, "depth": 2, "role": "rollout", "token_ids": [9], "reward": 1.0},
    ...     {"id": 3, "parent": 1, "depth": 2, "role": "rollout", "token_ids": [9], "reward": 0.0},
    ...     {"id": 4, "parent": 1, "depth": 2, "token_ids": [6], "logprobs": [-1.0], "reward": 1.0}]})
    >>> [(segment.id, segment.advantage) for segment in spo_chain(tree, AlgorithmSettings(name="spo_chain"))]
    [('q/4', 0.5)]
    """
    return trainable(tree, differences(tree), settings)


def differences(tree: RolloutTree) -> Iterator[tuple[int, float]]:
    """(node id, V(end) - V(start)) of each segment of a chain; 0 where either has no value.

    Raises:
        TreeError: a leaf that was not aborted has no reward.
    """
    for leaf in tree.leaves():
        if leaf.reward is None and leaf.finish_reason is not FinishReason.ABORT:
            raise TreeError(f"node {leaf.id} is a leaf without a reward")
    known = chain_values(tree.nodes)
    for node in tree.nodes[1:]:
        assert node.parent is not None, "only the first node has no parent"
        cut_short = node.finish_reason is FinishReason.ABORT and not tree.children[node.id]
        if node.role is not Role.SEGMENT or cut_short:
            continue
        end, start = known[node.id], known[node.parent]
        yield node.id, 0.0 if end is None or start is None else end - start
