"""The penalty for responses that come near the token limit (DAPO's soft overlong punishment, arXiv 2503.14476).

    taken(T) = 0                                             T <= limit - buffer
               penalty * (T - (limit - buffer)) / buffer     up to the limit

T is the whole response, prompt's end to leaf. It is taken from the leaves' rewards before any value is computed,
so that every algorithm sees it, values of rollouts included.
"""

from typing import TypeVar

from shared.tree import RolloutTree

AnyTree = TypeVar("AnyTree", bound=RolloutTree)


def taken(length: int, *, limit: int, buffer: int, penalty: float) -> float:
    """What a response of `length` tokens loses.

    >>> [taken(length, limit=100, buffer=20, penalty=1.0) for length in (80, 90, 100)]
    [0.0, 0.5, 1.0]
    """
    return penalty * min(1.0, max(0.0, (length - (limit - buffer)) / buffer))


def penalise(tree: AnyTree, *, limit: int, buffer: int, penalty: float) -> AnyTree:
    """The tree with the penalty taken from the rewards of its leaves; a buffer of 0 takes nothing.

    The nodes' own `value` fields are left as they came: no algorithm reads them.
    """
    if not buffer:
        return tree
    lengths = [0] * len(tree.nodes)
    nodes = list(tree.nodes)
    for node in tree.nodes[1:]:
        assert node.parent is not None, "only the first node has no parent"
        lengths[node.id] = lengths[node.parent] + len(node.token_ids)
        lost = taken(lengths[node.id], limit=limit, buffer=buffer, penalty=penalty)
        if node.reward is not None and lost:
            nodes[node.id] = node.model_copy(update={"reward": node.reward - lost})
    return tree.model_copy(update={"nodes": nodes})
