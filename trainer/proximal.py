"""What the policy says of a step's tokens before the step's first update: the proximal policy of `losses`.

With one update a step that update's own logprobs are it, and nothing of this runs. With several, all of the step's
rows are scored once before the first, packed as they will train.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from trainer.algorithms.base import Segment
from trainer.packing import PAD, Row, by_tree, collate, micro_batches, needed, rows
from trainer.policy import token_logprobs

Proximal = Mapping[int, Sequence[NDArray[np.float64]]]
"""By the identity of a tree: of each of its rows [L] logprobs (nats), 0 past its last participating token."""


@torch.no_grad()
def score_proximal(
    policy: PreTrainedModel,
    segments: Iterable[Segment],
    *,
    mask_threshold: float | None,
    temperature: float,
    token_budget: int,
) -> Proximal:
    """Score everything that a step trains.

    Args:
        policy: as it stands before the step.
        segments: all of the step's.
        mask_threshold: rho of the probability mask; None for no mask.
        temperature: that the segments were sampled at.
        token_budget: most tokens of a micro-batch, padding included.
    """
    found: dict[int, list[NDArray[np.float64]]] = {}
    targets: dict[int, NDArray[np.float64]] = {}
    wanted: list[Row] = []
    for tree in by_tree(segments):
        made = rows(tree, mask_threshold=mask_threshold)
        found[id(tree[0].tree)] = known = [np.zeros(len(row)) for row in made]
        for row, target in zip(made, known, strict=True):
            for cut in needed([row]):  # one, or none where nothing participates
                targets[id(cut)] = target
                wanted.append(cut)
    for micro in micro_batches(wanted, token_budget=token_budget):
        logprobs = token_logprobs(policy, collate(micro, PAD, policy.device), temperature)
        for row, own in zip(micro, logprobs.double().cpu().numpy(), strict=True):
            targets[id(row)][: len(row)] = own[: len(row)]
    return found


def rows_with(
    segments: Iterable[Segment], proximal: Proximal, *, mask_threshold: float | None
) -> list[Row]:
    """The rows of a share of the step's segments that keeps trees together, with their proximal logprobs."""
    return [
        replace(row, proximal_logprobs=known)
        for tree in by_tree(segments)
        for row, known in zip(
            rows(tree, mask_threshold=mask_threshold), proximal[id(tree[0].tree)], strict=True
        )
    ]
