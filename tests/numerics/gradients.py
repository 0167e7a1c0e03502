"""Gradients by the logits of the enumerable policy, and what a set of gradients says of signal and noise.

Rows, mask, whitening and policy loss are the trainer's own; only the model under them is a table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from shared.tree import RolloutTree
from tests.numerics.enumerable import END, PROMPT, STATES, Table, Vector
from trainer.algorithms.base import Segment
from trainer.losses import policy_loss
from trainer.mask import participates
from trainer.packing import rows
from trainer.whiten import whiten, whiten_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Tokens of the rows of some trees, one after the other."""

    state: NDArray[np.int64]
    """[N] question * STATES + state; only tokens where the policy has a choice."""
    token: NDArray[np.int64]
    behaviour: Vector
    advantage: Vector
    participates: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence["Packed"]) -> "Packed":
        """Several as one."""
        names = ("state", "token", "behaviour", "advantage", "participates")
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})

    def masked(self, rho: float | None) -> "Packed":
        """The same under the probability mask."""
        everything = np.ones(len(self.token), np.bool_)
        return replace(self, participates=participates(everything, self.behaviour, rho))

    def whitened(self) -> "Packed":
        """The same as one optimizer batch with its advantages whitened."""
        return replace(self, advantage=whiten(self.advantage, self.participates))


NOTHING = Packed(
    state=np.zeros(0, np.int64),
    token=np.zeros(0, np.int64),
    behaviour=np.zeros(0),
    advantage=np.zeros(0),
    participates=np.zeros(0, np.bool_),
)
"""Of trees without signal."""


def packed(segments: Sequence[Segment], *, rho: float | None, whiten: bool = False) -> Packed:
    """The response tokens of the real rows. A token without a choice stays in the count with state -1."""
    made = rows(segments, mask_threshold=rho)
    parts = [
        Packed(
            state=np.array(states_of(row.token_ids, row.response), np.int64),
            token=row.token_ids[row.response],
            behaviour=row.behaviour_logprobs[row.response],
            advantage=row.advantages[row.response],
            participates=row.participates[row.response],
        )
        for row in (whiten_rows(made) if whiten else made)
    ]
    return Packed.joined(parts) if parts else NOTHING


def states_of(token_ids: NDArray[np.int64], response: NDArray[np.bool_]) -> list[int]:
    """question * STATES + state of each response token; -1 where there is no choice."""
    question, *tokens = token_ids.tolist()
    before, found = 0, []
    for token, own in zip(tokens, response[1:].tolist(), strict=True):
        if own:
            found.append((question - PROMPT) * STATES + before if before < STATES else -1)
        before = 2 * before + 1 + (token % END)
    return found


def batch_gradient(
    table: Table, batch: Packed, *, denominator: float | None = None, weights: Vector | None = None
) -> Vector:
    """[questions * STATES * 3] the direction of ascent, minus the real policy loss's gradient by the logits.

    Args:
        table: the policy, which also sampled.
        batch: tokens of one optimizer batch.
        denominator: of the loss; None is the count of participating tokens, as the trainer has it.
        weights: [N] of each token.
    """
    logits = torch.tensor(table.logits.reshape(-1, 3), requires_grad=True)
    chosen = logits.log_softmax(-1)[torch.from_numpy(batch.state), torch.from_numpy(batch.token)]
    sure = torch.from_numpy(batch.state < 0)
    loss = policy_loss(
        chosen.masked_fill(sure, 0.0),
        torch.from_numpy(batch.behaviour),
        torch.from_numpy(batch.advantage),
        torch.from_numpy(batch.participates),
        denominator=batch.participates.sum() if denominator is None else denominator,
        weights=None if weights is None else torch.from_numpy(weights),
    ).loss
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    assert logits.grad is not None
    return -logits.grad.numpy().ravel()


def branching_weights(tree: RolloutTree) -> list[float]:
    """[N] what makes the sum over a tree's segments of weight * (V(node) - V(parent)) ∇logprob unbiased.

        weight(node) = 1 / ((m - 1) * product of the numbers of children of all nodes above its parent)

    m is the number of siblings, itself included. A tree samples a segment at depth d as often as there are nodes
    there, so each path's share is one over the product of the branch factors above it; and V(parent), which
    includes the node itself, keeps (m - 1) / m of its advantage. Nodes that finish early change nothing: a
    share is the same whatever grows below it. An only child has no advantage; its weight is 0.
    """
    share, weights = [1.0], [0.0]
    for node in tree.nodes[1:]:
        assert node.parent is not None
        siblings = len(tree.children[node.parent])
        share.append(share[node.parent] / siblings)
        weights.append(share[node.parent] / (siblings - 1) if siblings > 1 else 0.0)
    return weights


def cosine(x: Vector, y: Vector) -> float:
    """Of the angle between two gradients."""
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def signal(gram: Vector) -> tuple[float, float]:
    """(|E g|^2, tr Cov(g)), both without bias, from the inner products [B, B] of B independent gradients."""
    size = len(gram)
    squared = float(gram.sum() - np.trace(gram)) / (size * (size - 1))
    return squared, float(np.trace(gram)) / size - squared
