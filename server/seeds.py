"""One seeded stream for each (request, node, sample)."""

import hashlib
from collections.abc import Sequence

SAMPLES = 4096
"""Streams kept free after each node's seed: an engine's sample i draws from seed + i."""


def node_seed(request_seed: int, path: Sequence[int]) -> int:
    """Seed of the children of one node; theirs are this seed, this seed + 1, and so on.

    The node is named by its path of sibling positions, so that the order in which nodes happen to finish
    changes nothing.

    Args:
        request_seed: of the whole tree.
        path: sibling positions from the prompt down to the node; empty for the prompt.

    Returns:
        A multiple of `SAMPLES` below 2**62: streams of different nodes never overlap by counting up.
    """
    return _seed(",".join(map(str, (request_seed, *path))))


def state_seed(request_seed: int, response: Sequence[int]) -> int:
    """Seed of the Monte Carlo rollouts from one state; never that of a node.

    The state is named by its tokens, so that every response which reaches it finds the same rollouts.

    Args:
        request_seed: of the whole tree.
        response: [b] tokens from the prompt's end to the state; empty for the prompt.

    Returns:
        A multiple of `SAMPLES` below 2**62, as `node_seed`.
    """
    return _seed(f"{request_seed} state {','.join(map(str, response))}")


def _seed(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**50 * SAMPLES
