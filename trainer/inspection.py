"""What the trainer would do with one tree: value, advantage and participating tokens of each segment.

Pure: a tree and an algorithm's settings in, what to show out. Whitening and replay are of a whole optimizer batch,
so they are not in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shared.errors import ConfigError
from shared.tree import FinishReason, Node, Role, RolloutTree, chain_values
from trainer.algorithms import AlgorithmSettings, advantages
from trainer.algorithms.base import values
from trainer.config import PLANS
from trainer.mask import participates
from trainer.overlong import penalise
from trainer.tree_file import SavedTree


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView:
    """What becomes of one segment."""

    node: Node
    value: float | None
    """From the rewards, at the segment's end; None where nothing estimates it."""
    advantage: float
    """0.0 where the trainer drops the segment."""
    trained: bool
    """False where the trainer drops it."""
    participates: list[bool]
    """[T] tokens that take part in the loss; empty where the file gives no tokens."""

    @property
    def participating(self) -> int:
        """How many tokens take part."""
        return sum(self.participates)


@dataclass(frozen=True, kw_only=True)  # no slots: they leave no room for what is cached
class Inspection:
    """A tree as the trainer sees it."""

    saved: SavedTree
    tree: RolloutTree
    """With the rewards that the trainer takes, any overlong penalty off."""
    settings: AlgorithmSettings
    values: list[float | None]
    """[N] of every node."""
    segments: Mapping[int, SegmentView]
    """By node id, in the order of nodes."""

    def children(self, node_id: int) -> list[int]:
        """Ids of the segments below a node."""
        return [i for i in self.tree.children[node_id] if i in self.segments]

    def rollouts(self, node_id: int) -> list[Node]:
        """The Monte Carlo rollouts from a node's end."""
        nodes = (self.tree.nodes[i] for i in self.tree.children[node_id])
        return [node for node in nodes if node.role is Role.ROLLOUT]

    def stretch(self, node_id: int) -> list[int]:
        """A segment and those that follow it without a choice: one line of a chain, one node of a tree.

        Shown below each other, so that a chain of fifty segments is not fifty levels deep.
        """
        stretch = [node_id]
        while len(below := self.children(stretch[-1])) == 1:
            stretch += below
        return stretch

    @cached_property
    def largest_advantage(self) -> float:
        """max |A|: what colours are relative to; 1 where every one is 0."""
        return max((abs(view.advantage) for view in self.segments.values()), default=0.0) or 1.0

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """(lowest, highest) that a value may have: 0 and 1, or what there is beyond."""
        known = [value for value in self.values if value is not None]
        return min([0.0, *known]), max([1.0, *known])

    def totals(self) -> dict[str, int]:
        """Counts over the tree: segments and tokens, with those that train, leaves, rollouts, failed rewards."""
        views = self.segments.values()
        roles = [node.role for node in self.tree.nodes]
        return {
            "segments": len(self.segments),
            "trained segments": sum(view.trained for view in views),
            "tokens": sum(len(view.participates) for view in views),
            "participating tokens": sum(view.participating for view in views),
            "leaves": sum(node.role is Role.SEGMENT for node in self.tree.leaves()),
            "rollouts": sum(role is Role.ROLLOUT for role in roles),
            "failed rewards": sum(node.reward_error is not None for node in self.tree.nodes),
        }

    def as_json(self) -> list[dict[str, Any]]:
        """One object a segment, in the order of nodes: id, value, advantage, participates."""
        return [
            {
                "id": node_id,
                "value": view.value,
                "advantage": view.advantage,
                "participates": view.participates,
            }
            for node_id, view in self.segments.items()
        ]


def inspect(
    saved: SavedTree, settings: AlgorithmSettings, *, max_tokens: int | None = None
) -> Inspection:
    """Values, advantages and participating tokens of a tree's segments.

    Args:
        saved: the tree. Its own `value` fields are never read.
        settings: of the algorithm.
        max_tokens: limit of a response, which an overlong penalty counts from.

    Raises:
        ConfigError: a leaf has no reward, the tree is not of a plan that the algorithm is made for, or a segment
            that trains has no logprobs for the mask.

    >>> from trainer.tree_file import parse
    >>> saved = parse('''[{}, {"parent": 0, "token_ids": [7, 8], "logprobs": [-0.01, -2], "reward": 1},
    ...     {"parent": 0, "token_ids": [9], "logprobs": [-1], "reward": 0}]''')
    >>> [(v["advantage"], v["participates"]) for v in inspect(saved, AlgorithmSettings()).as_json()]
    [(0.5, [False, True]), (-0.5, [True])]
    """
    tree = _penalised(saved.tree, settings, max_tokens)
    _check_leaves(tree)
    try:
        chosen = {s.node_id: s.advantage for s in advantages(tree, settings)}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    chain = saved.is_chain or "chain" in PLANS[settings.name]
    known = chain_values(tree.nodes) if chain else values(tree)
    return Inspection(
        saved=saved,
        tree=tree,
        settings=settings,
        values=known,
        segments={
            node.id: SegmentView(
                node=node,
                value=known[node.id],
                advantage=chosen.get(node.id, 0.0),
                trained=node.id in chosen and node.id not in saved.tokenless,
                participates=[]
                if node.id in saved.tokenless
                else _participates(node, node.id in chosen, settings.mask_threshold),
            )
            for node in tree.nodes
            if node.role is Role.SEGMENT
        },
    )


def _penalised(
    tree: RolloutTree, settings: AlgorithmSettings, max_tokens: int | None
) -> RolloutTree:
    if not settings.overlong_buffer:
        return tree
    if max_tokens is None:
        raise ConfigError(
            "algorithm.overlong_buffer counts from rollout.max_tokens: give the run's --config too"
        )
    return penalise(
        tree,
        limit=max_tokens,
        buffer=settings.overlong_buffer,
        penalty=settings.overlong_penalty,
    )


def _check_leaves(tree: RolloutTree) -> None:
    for leaf in tree.leaves():
        if leaf.reward is None and leaf.finish_reason is not FinishReason.ABORT:
            raise ConfigError(
                f"node {leaf.id}: a leaf without a reward; give every leaf one "
                "(a saved answer has them where the request named a reward)"
            )


def _participates(node: Node, trained: bool, threshold: float | None) -> list[bool]:
    count = len(node.token_ids)
    if not trained:
        return [False] * count
    if node.logprobs is None and threshold is not None:
        raise ConfigError(
            f"node {node.id}: no logprobs, which the probability mask needs; "
            "give them, or --set algorithm.mask_threshold=null"
        )
    logprobs = np.zeros(count) if node.logprobs is None else np.array(node.logprobs)
    taking_part: list[bool] = participates(np.ones(count, np.bool_), logprobs, threshold).tolist()
    return taking_part
