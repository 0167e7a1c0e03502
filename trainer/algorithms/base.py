"""What every algorithm takes and gives: a rollout tree in, the segments that train out.

An algorithm is a pure function of one tree. It gives each node that trains one advantage, which all of the node's
tokens share (DESIGN section 4; arXiv 2505.23564, section 4).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared.tree import FinishReason, Node, Role, RolloutTree, backup

NEGLIGIBLE = 1e-9
"""An advantage closer to zero than this carries no gradient."""
STD_EPSILON = 1e-8
"""Added to a standard deviation before dividing by it."""


class AlgorithmName(StrEnum):
    """The algorithms there are."""

    SPO_TREE = "spo_tree"
    SPO_CHAIN = "spo_chain"
    VINEPPO = "vineppo"
    GRPO = "grpo"
    RLOO = "rloo"
    PPO = "ppo"


class AdvantageKind(StrEnum):
    """How `spo_tree` turns values into an advantage."""

    DIFFERENCE = "difference"
    """V(node) - V(parent)."""
    NORMALISED = "normalised"
    """The difference over the population standard deviation of the siblings' values."""
    UNBIASED = "unbiased"
    """The difference, weighted so that a tree's gradient is that of the mean reward: ours, not the paper's."""


class AlgorithmSettings(BaseModel):
    """Which tokens train, and with what advantage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: AlgorithmName = AlgorithmName.SPO_TREE
    advantage: AdvantageKind = Field(
        default=AdvantageKind.DIFFERENCE, description="Read by spo_tree alone."
    )
    drop_zero: bool = Field(default=True, description="Drop segments that carry no gradient.")
    zero_tolerance: float = Field(
        default=NEGLIGIBLE,
        ge=0,
        description="An advantage closer to zero than this is none; 0 drops exact zeros alone, as the authors do.",
    )
    mask_threshold: float | None = Field(
        default=0.9,
        gt=0,
        le=1,
        description="rho: only tokens with behaviour probability below it train; none trains all.",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount of a token; read by ppo.")
    gae_lambda: float = Field(default=1.0, ge=0, le=1, description="GAE's lambda; read by ppo.")
    overlong_buffer: int = Field(
        default=0, ge=0, description="Tokens before max_tokens in which a response is penalised."
    )
    overlong_penalty: float = Field(
        default=1.0, gt=0, description="Taken from the reward of a response of max_tokens."
    )

    @field_validator("mask_threshold", mode="before")
    @classmethod
    def _none(cls, threshold: object) -> object:
        return None if threshold == "none" else threshold  # TOML has no null


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTargets:
    """What a critic gives each token of a segment."""

    advantages: NDArray[np.float64]
    """[T] in the place of the segment's one advantage."""
    values: NDArray[np.float64]
    """[T] the critic's value before each token, when it was scored."""
    returns: NDArray[np.float64]
    """[T] what the critic should have said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A node that trains."""

    tree: RolloutTree
    node_id: int
    advantage: float
    """Shared by every token of the node; in rewards, or in standard deviations of them."""
    tokens: TokenTargets | None = None
    """Each token's own, from a critic; None where all share `advantage`."""

    @property
    def id(self) -> str:
        """Name that survives a checkpoint: `request_id/node_id`."""
        return f"{self.tree.request_id}/{self.node_id}"

    @property
    def node(self) -> Node:
        """The node itself."""
        return self.tree.nodes[self.node_id]


class Algorithm(Protocol):
    """One tree's segments, always in the same order."""

    def __call__(self, tree: RolloutTree, settings: AlgorithmSettings, /) -> list[Segment]:
        """Raise ValueError for a tree of a plan that the algorithm is not made for."""


def values(tree: RolloutTree) -> list[float | None]:
    """Value of every node, from the leaves' rewards: a tree's own `value` fields are never read.

    An aborted leaf was cut by us, not by the policy, so its reward says nothing: it is missing data, and so is a
    node below which every leaf was aborted. They have no value and count in no mean.

    Returns:
        [N] values; None for missing nodes.

    Raises:
        TreeError: a leaf that was not aborted has no reward.
        ValueError: the tree holds Monte Carlo rollouts, where values are means over those alone (chain plans).
    """
    kept = [node.finish_reason is not FinishReason.ABORT for node in tree.nodes]
    for node in reversed(tree.nodes):
        if node.role is Role.ROLLOUT:
            raise ValueError(f"tree {tree.request_id!r} is of a chain plan: it has value rollouts")
        if tree.children[node.id]:
            kept[node.id] = any(kept[child] for child in tree.children[node.id])
    nodes = [node for node in tree.nodes if kept[node.id]]
    place = {node.id: position for position, node in enumerate(nodes)}
    known = backup(
        [None if node.parent is None else place[node.parent] for node in nodes],
        [node.reward for node in nodes],
    )
    return [known[place[node.id]] if kept[node.id] else None for node in tree.nodes]


def negligible(advantage: float) -> bool:
    """True for what is zero but for rounding."""
    return abs(advantage) < NEGLIGIBLE


def trainable(
    tree: RolloutTree, advantages: Iterable[tuple[int, float]], settings: AlgorithmSettings
) -> list[Segment]:
    """Segments of (node id, advantage) pairs, less those without tokens and, by the switch, without advantage."""
    return [
        Segment(tree=tree, node_id=node_id, advantage=advantage)
        for node_id, advantage in advantages
        if tree.nodes[node_id].token_ids
        and not (
            settings.drop_zero and (advantage == 0 or abs(advantage) < settings.zero_tolerance)
        )
    ]
