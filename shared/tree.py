"""The rollout tree: what a server returns for one prompt, and what every algorithm reads.

A node holds the tokens sampled for one segment; its parent's path is the state it was sampled from. Values come
from the leaves' rewards alone (`backup`), so one tree gives a value at every boundary with no extra rollouts
(arXiv 2505.23564, section 4).
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import TreeError


class Role(StrEnum):
    """What a node's tokens are."""

    PROMPT = "prompt"
    SEGMENT = "segment"
    ROLLOUT = "rollout"
    """A Monte Carlo rollout that estimates a value and is never trained on."""


class FinishReason(StrEnum):
    """Why the engine stopped sampling a node."""

    STOP = "stop"
    """End token or stop string; the end token is part of `token_ids`."""
    LENGTH = "length"
    """The segment's or the response's token limit."""
    ABORT = "abort"


class Node(BaseModel):
    """One node of a rollout tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int = Field(ge=0, description="Position in `nodes`; 0 is the prompt.")
    parent: int | None = Field(description="The parent's id; null for the prompt alone.")
    depth: int = Field(ge=0, description="Edges from the prompt.")
    role: Role = Role.SEGMENT
    token_ids: list[int] = Field(
        default_factory=list, description="[T] token ids of this node alone."
    )
    logprobs: list[float] | None = Field(
        default=None,
        description="[T] behaviour log-probability (nats) of each token; null for the prompt.",
    )
    versions: list[tuple[int, int]] = Field(
        default_factory=list, description="Run-length spans [weight version, token count]."
    )
    finish_reason: FinishReason | None = None
    text: str | None = Field(
        default=None, description="`token_ids` decoded; null unless asked for."
    )
    reward: float | None = Field(
        default=None, description="Reward of the whole response, at leaves."
    )
    reward_error: str | None = Field(default=None, description="Why the reward function failed.")
    value: float | None = Field(
        default=None, description="Mean of the children's values; a leaf's reward."
    )

    @model_validator(mode="after")
    def _one_logprob_per_token(self) -> Self:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(
                f"node {self.id}: {len(self.logprobs)} logprobs for {len(self.token_ids)} tokens"
            )
        if self.versions and sum(count for _, count in self.versions) != len(self.token_ids):
            raise ValueError(f"node {self.id}: version spans do not add up to its tokens")
        return self


class RolloutTree(BaseModel):
    """Nodes of one prompt's tree, parents before children, depth first.

    Raises (on construction):
        pydantic.ValidationError: ids that are not positions, a parent that does not come before its child, more
            than one root.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str = ""
    nodes: list[Node] = Field(min_length=1)

    @model_validator(mode="after")
    def _parents_first(self) -> Self:
        for position, node in enumerate(self.nodes):
            if node.id != position:
                raise ValueError(f"node at position {position} has id {node.id}; ids are positions")
            if (node.parent is None) != (position == 0):
                raise ValueError(f"node {node.id}: the first node, and no other, has no parent")
            if node.parent is not None:
                if not 0 <= node.parent < position:
                    raise ValueError(
                        f"node {node.id}: parent {node.parent} does not come before it"
                    )
                if node.depth != self.nodes[node.parent].depth + 1:
                    raise ValueError(f"node {node.id}: depth is not its parent's plus one")
        return self

    @cached_property
    def children(self) -> list[list[int]]:
        """[N] ids of each node's children, in order."""
        children: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            if node.parent is not None:
                children[node.parent].append(node.id)
        return children

    @property
    def prompt_token_ids(self) -> list[int]:
        """[P] the prompt's token ids."""
        return self.nodes[0].token_ids

    def leaves(self) -> Iterator[Node]:
        """Nodes without children, the prompt excepted, in order."""
        return (node for node in self.nodes[1:] if not self.children[node.id])

    def path(self, node_id: int) -> list[Node]:
        """The nodes from the first below the prompt down to `node_id`, both included."""
        path: list[Node] = []
        node = self.nodes[node_id]
        while node.parent is not None:
            path.append(node)
            node = self.nodes[node.parent]
        return path[::-1]

    def response_token_ids(self, node_id: int) -> list[int]:
        """[T] the tokens from the prompt's end to the end of `node_id`."""
        return [token for node in self.path(node_id) for token in node.token_ids]

    def with_values(self, *, chain: bool = False) -> Self:
        """This tree with every value computed from the rewards.

        Args:
            chain: the tree is of a chain plan, see `chain_values`; else see `backup`.
        """
        values = (
            chain_values(self.nodes)
            if chain
            else backup([node.parent for node in self.nodes], [node.reward for node in self.nodes])
        )
        nodes = [
            node.model_copy(update={"value": value})
            for node, value in zip(self.nodes, values, strict=True)
        ]
        return self.model_copy(update={"nodes": nodes})


def chain_values(nodes: Sequence[Node]) -> list[float | None]:
    """Values of a chain plan: the mean reward of a node's rollouts; the reward itself where a response ends.

    An aborted rollout was cut by us and says nothing: it counts in no mean.

    Args:
        nodes: [N] of a tree, parents before children.

    Returns:
        [N] values; None where a node has neither rollouts nor a reward: for the prompt unless it is a boundary.

    >>> prompt = Node(id=0, parent=None, depth=0, role=Role.PROMPT, token_ids=[5])
    >>> first = Node(id=1, parent=0, depth=1, token_ids=[6])
    >>> rollouts = [Node(id=i, parent=1, depth=2, role=Role.ROLLOUT, reward=i - 2.0) for i in (2, 3)]
    >>> chain_values([prompt, first, *rollouts, Node(id=4, parent=1, depth=2, token_ids=[7], reward=1.0)])
    [None, 0.5, 0.0, 1.0, 1.0]
    """
    estimates: list[list[float]] = [[] for _ in nodes]
    for node in nodes:
        aborted = node.finish_reason is FinishReason.ABORT
        if node.role is Role.ROLLOUT and node.reward is not None and not aborted:
            assert node.parent is not None, "a rollout has a state that it starts from"
            estimates[node.parent].append(node.reward)
    return [
        sum(rewards) / len(rewards) if rewards else node.reward
        for node, rewards in zip(nodes, estimates, strict=True)
    ]


def backup(parents: Sequence[int | None], rewards: Sequence[float | None]) -> list[float | None]:
    """Values bottom-up: a leaf's is its reward, another's the mean of its children's.

    Args:
        parents: [N] parent of each node, before it in the list; None for the root.
        rewards: [N] reward of each leaf; ignored elsewhere.

    Returns:
        [N] values. Only a root without children may have None.

    Raises:
        TreeError: a leaf without a reward.

    >>> backup([None, 0, 1, 1, 0], [None, None, 1.0, 0.0, 1.0])
    [0.75, 0.5, 1.0, 0.0, 1.0]
    """
    below: list[list[float]] = [[] for _ in parents]
    values: list[float | None] = [None] * len(parents)
    for position in range(len(parents) - 1, -1, -1):
        parent = parents[position]
        # Reversed, because children arrive last first and the mean should add in tree order.
        value = (
            sum(reversed(below[position])) / len(below[position])
            if below[position]
            else rewards[position]
        )
        if value is None and parent is not None:
            raise TreeError(f"node {position} is a leaf without a reward")
        values[position] = value
        if parent is not None and value is not None:
            below[parent].append(value)
    return values
