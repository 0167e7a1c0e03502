"""From segments to rows of tokens, and from rows to padded batches.

A row is a path from the prompt down to a segment with no selected segment below it. Selected segments higher up on
the path ride along in the first row that has them, so each selected token trains exactly once and a shared prefix
costs no row of its own.

Position convention, everywhere in the trainer: what stands at position t belongs to token t. Its logprob is
that of token t given the tokens before it, which a decoder computes from its output at t - 1. Position 0 has
nothing before it and never trains.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.tree import Node, RolloutTree
from trainer.algorithms import Segment
from trainer.mask import participates

PAD = 0
"""Any token: padding lies right of what is scored, where causal attention does not look."""
NO_VERSION = -1
"""Stands for a token that no version sampled, such as a prompt's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One path of one tree, its arrays aligned to the tokens."""

    token_ids: NDArray[np.int64]
    """[L] prompt and response."""
    response: NDArray[np.bool_]
    """[L] tokens of the segments that this row trains."""
    participates: NDArray[np.bool_]
    """[L] those of them that pass the probability mask."""
    behaviour_logprobs: NDArray[np.float64]
    """[L] nats; 0 where nothing trains."""
    advantages: NDArray[np.float64]
    """[L] advantage of the token, which is its segment's unless a critic gave its own; 0 where nothing trains."""
    values: NDArray[np.float64]
    """[L] the critic's value before each token, when it was scored; 0 where there is none."""
    returns: NDArray[np.float64]
    """[L] what the critic should have said; 0 where there is none."""
    proximal_logprobs: NDArray[np.float64]
    """[L] nats, at the start of the step; 0 where nothing was scored. See `Learner.score_proximal`."""
    versions: NDArray[np.int64]
    """[L] weight version that sampled each token; -1 for prompts."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows side by side, padded on the right; the fields are those of `Row`, [B, L].

    Padding trains nothing, and under causal attention nothing before it sees it: no attention mask is needed.
    """

    token_ids: Tensor
    response: Tensor
    participates: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    proximal_logprobs: Tensor
    versions: Tensor


def rows(segments: Iterable[Segment], *, mask_threshold: float | None) -> list[Row]:
    """Rows that train every token of every segment once; tree by tree, in the order of nodes.

    Trees are told apart by identity, not by name. Segments without tokens are left out.

    Args:
        segments: of any trees, in any order, each at most once.
        mask_threshold: rho of the probability mask; None for no mask.

    Raises:
        ValueError: a segment given twice, one without behaviour logprobs, or a tree without a prompt.

    >>> tree = RolloutTree.model_validate({"nodes": [
    ...     {"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [5, 6]},
    ...     {"id": 1, "parent": 0, "depth": 1, "token_ids": [7], "logprobs": [-0.5], "versions": [[3, 1]]},
    ...     {"id": 2, "parent": 1, "depth": 2, "token_ids": [8], "logprobs": [-0.7], "versions": [[3, 1]]},
    ...     {"id": 3, "parent": 1, "depth": 2, "token_ids": [9], "logprobs": [-0.01], "versions": [[4, 1]]}]})
    >>> first, second = rows([Segment(tree=tree, node_id=1, advantage=0.25),
    ...     Segment(tree=tree, node_id=2, advantage=0.5), Segment(tree=tree, node_id=3, advantage=-0.5)],
    ...     mask_threshold=0.9)
    >>> first.token_ids.tolist(), first.response.tolist(), first.advantages.tolist()
    ([5, 6, 7, 8], [False, False, True, True], [0.0, 0.0, 0.25, 0.5])

    Token 7 trains in the first row, from the decoder's output at position 1; in the second it is context. Token
    9 had probability 0.99, so it trains but does not take part.

    >>> second.token_ids.tolist(), second.response.tolist(), second.participates.tolist()
    ([5, 6, 7, 9], [False, False, False, True], [False, False, False, False])
    >>> second.versions.tolist()
    [-1, -1, 3, 4]
    """
    return [row for selected in by_tree(segments) for row in _tree_rows(selected, mask_threshold)]


def by_tree(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Segments that share a tree together, the trees in the order of their first segment."""
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(id(segment.tree), []).append(segment)
    return list(groups.values())


def _tree_rows(segments: list[Segment], mask_threshold: float | None) -> Iterator[Row]:
    tree = segments[0].tree
    waiting: dict[int, Segment] = {}
    for segment in segments:
        if segment.node_id in waiting:
            raise ValueError(f"segment {segment.id} is given twice")
        if segment.node.token_ids:
            waiting[segment.node_id] = segment
    above = {node.id for node_id in waiting for node in tree.path(node_id)[:-1]}
    for deepest in sorted(waiting.keys() - above):
        path = tree.path(deepest)
        owned = {node.id: waiting.pop(node.id) for node in path if node.id in waiting}
        yield _row(tree, path, owned, mask_threshold)


def _row(
    tree: RolloutTree, path: list[Node], owned: dict[int, Segment], mask_threshold: float | None
) -> Row:
    token_ids = tree.prompt_token_ids + [token for node in path for token in node.token_ids]
    start = len(tree.prompt_token_ids)
    if start == 0:
        raise ValueError(f"tree {tree.request_id!r} has no prompt tokens; give it a start token")
    response = np.zeros(len(token_ids), np.bool_)
    logprobs, advantages, values, returns = np.zeros((4, len(token_ids)))
    versions = np.full(len(token_ids), NO_VERSION, np.int64)
    for node in path:
        span = slice(start, start := start + len(node.token_ids))
        if node.versions:
            numbers, counts = zip(*node.versions, strict=True)
            versions[span] = np.repeat(numbers, counts)
        segment = owned.get(node.id)
        if segment is not None:
            if node.logprobs is None:
                raise ValueError(f"segment {segment.id} has no behaviour logprobs")
            response[span], logprobs[span] = True, node.logprobs
            own = segment.tokens
            advantages[span] = segment.advantage if own is None else own.advantages
            if own is not None:
                values[span], returns[span] = own.values, own.returns
    return Row(
        token_ids=np.array(token_ids, np.int64),
        response=response,
        participates=participates(response, logprobs, mask_threshold),
        behaviour_logprobs=logprobs,
        advantages=advantages,
        values=values,
        returns=returns,
        proximal_logprobs=np.zeros(len(token_ids)),
        versions=versions,
    )


def participating_tokens(rows: Iterable[Row]) -> int:
    """The loss's denominator: tokens that take part in an optimizer batch."""
    return sum(int(row.participates.sum()) for row in rows)


def needed(rows: Iterable[Row]) -> list[Row]:
    """The rows as far as a loss over participating tokens reads them: none that lacks any, none past its last one.

    Under causal attention no position sees what comes after it, so the loss and its gradient stay the same.
    """
    ends = ((row, np.flatnonzero(row.participates)) for row in rows)
    return [_cut(row, int(places[-1]) + 1) for row, places in ends if len(places)]


def _cut(row: Row, length: int) -> Row:
    return Row(**{field.name: getattr(row, field.name)[:length] for field in fields(Row)})


def micro_batches(rows: Sequence[Row], *, token_budget: int) -> list[list[Row]]:
    """Rows cut into micro-batches of at most `token_budget` positions, padding counted, longest rows first.

    Rows of similar lengths stand together, which keeps padding small; the largest comes first, so that a
    machine too small for it fails at once. A row longer than the budget gets a micro-batch of its own.
    """
    cut: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        # The first row of a micro-batch is its longest: padding fills the others up to it.
        if cut and len(cut[-1][0]) * (len(cut[-1]) + 1) <= token_budget:
            cut[-1].append(row)
        else:
            cut.append([row])
    return cut


def collate(rows: Sequence[Row], pad_id: int, device: torch.device | str) -> Batch:
    """[B, L] tensors of at least one row, on `device`; logprobs and advantages in float32."""
    width = max(len(row) for row in rows)
    padding: dict[str, Any] = {"token_ids": pad_id, "versions": NO_VERSION}
    tensors = {}
    for field in fields(Batch):
        arrays = [getattr(row, field.name) for row in rows]
        padded = np.full((len(rows), width), padding.get(field.name, 0), arrays[0].dtype)
        for target, array in zip(padded, arrays, strict=True):
            target[: len(array)] = array
        tensor = torch.from_numpy(padded)
        tensors[field.name] = (tensor.float() if tensor.is_floating_point() else tensor).to(device)
    return Batch(**tensors)


def optimizer_batches(
    segments: Iterable[Segment], updates: int, rng: random.Random
) -> list[list[Segment]]:
    """An iteration's segments split over its optimizer updates, whole trees at a time.

    Keeping a tree together keeps its prefixes shared. Trees go, longest first, to the batch with the fewest
    tokens; trees of equal length in random order.

    Returns:
        At most `updates` batches, none empty, in random order: fewer where there are fewer trees.
    """

    def tokens(group: list[Segment]) -> int:
        return sum(len(segment.node.token_ids) for segment in group)

    trees = by_tree(segments)
    rng.shuffle(trees)
    batches: list[list[Segment]] = [[] for _ in range(updates)]
    for tree in sorted(trees, key=tokens, reverse=True):
        min(batches, key=tokens).extend(tree)
    rng.shuffle(batches)
    return [batch for batch in batches if batch]
