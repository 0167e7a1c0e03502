"""PPO: a critic's value before every token, and generalised advantages (arXiv 1707.06347; GAE: 1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = sum_k (gamma lambda)^k delta_{t+k}        return_t = A_t + V_t

V_t is the critic's value of the state before token t. The reward stands on the last token, and the state after it
has no value, whether the response ended by itself or was cut. With gamma = lambda = 1, A_t = R - V_t.
Edge cases: a response without tokens gives nothing; an aborted one has no reward and is left out; responses that
share a node are refused, as in `grpo`.

The advantages need the critic (`trainer/critic.py`), so this file gives the responses that it scores and the pure
arithmetic; asked for a tree's advantages alone, it refuses.
"""

import numpy as np
from numpy.typing import NDArray

from shared.tree import RolloutTree
from trainer.algorithms.base import AlgorithmSettings, Segment
from trainer.algorithms.grpo import group


def ppo(tree: RolloutTree, settings: AlgorithmSettings) -> list[Segment]:
    """Refuses: see `responses`.

    Raises:
        ValueError: always.
    """
    raise ValueError("ppo's advantages need its critic's values, which a tree alone does not give")


def responses(tree: RolloutTree) -> list[Segment]:
    """One segment for each response, its reward in the place of the advantage, for the critic to replace.

    Raises:
        ValueError: the tree is not of a plan of kind "group".
    """
    found = group(tree)
    if any(len(path) > 1 for path, _ in found):
        raise ValueError(
            f"tree {tree.request_id!r}: its responses are cut into segments; "
            'ppo needs the plan {"kind": "group"}'
        )
    return [
        Segment(tree=tree, node_id=node_id, advantage=reward)
        for (node_id,), reward in found
        if tree.nodes[node_id].token_ids
    ]


def gae(
    values: NDArray[np.floating], reward: float, *, gamma: float, lam: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Advantages and returns of one response.

    Args:
        values: [T] the critic's value before each token, T at least 1.
        reward: of the whole response.
        gamma: discount of a token.
        lam: GAE's lambda; 1 trusts the reward alone, 0 the critic.

    Returns:
        ([T] advantages, [T] returns).

    >>> advantages, returns = gae(np.array([0.25, 0.5, 0.75]), 1.0, gamma=1.0, lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([0.75, 0.5, 0.25], [1.0, 1.0, 1.0])
    >>> gae(np.array([0.25, 0.5, 0.75]), 1.0, gamma=1.0, lam=0.0)[0].tolist()
    [0.25, 0.25, 0.25]
    """
    known = values.astype(np.float64)
    rewards = np.zeros(len(known))
    rewards[-1] = reward
    deltas = rewards + gamma * np.append(known[1:], 0.0) - known
    advantages = np.zeros(len(known))
    following = 0.0
    for position in range(len(known) - 1, -1, -1):
        following = deltas[position] + gamma * lam * following
        advantages[position] = following
    return advantages, advantages + known
