"""An answer of `POST /rollout_tree` as `application/x-ndjson`: a line for each node as it finishes, then the rest.

A node's line may come before its parent's and knows no id yet, so it is named by a key: the positions among
siblings that lead to it from the prompt, such as `0.2.1`. The last line is the tree's, with the keys in the order
of their ids and what is known only at the end, or an error's. Where a tree is begun anew, a line says so.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from shared.errors import TreeError
from shared.tree import FinishReason, Node, Role
from shared.wire import (
    KEY_PATTERN,
    Problem,
    RolloutTreeResponse,
    Timing,
    Usage,
    WeightVersions,
    WireModel,
)

Key = Annotated[
    str,
    Field(
        pattern=KEY_PATTERN,
        description="Positions among siblings, from the prompt; the prompt's own key is empty.",
    ),
]


class NodeLine(WireModel):
    """A node that has finished; its parent's key is its own less the last part."""

    kind: Literal["node"] = "node"
    key: Key
    depth: int = Field(ge=0)
    role: Role
    token_ids: list[int]
    logprobs: list[float] | None
    versions: list[tuple[int, int]]
    finish_reason: FinishReason | None
    text: str | None


class TreeLine(WireModel):
    """The last line: the order of the nodes, and what they lack."""

    kind: Literal["tree"] = "tree"
    request_id: str
    server_id: str
    model: str
    order: list[Key] = Field(min_length=1, description="[N] keys of the nodes, by id.")
    rewards: list[float | None] = Field(description="[N]")
    reward_errors: list[str | None] = Field(description="[N]")
    values: list[float | None] = Field(description="[N]")
    usage: Usage
    weight_versions: WeightVersions
    timing: Timing

    @model_validator(mode="after")
    def _one_of_each_per_node(self) -> Self:
        count = len(self.order)
        if {len(self.rewards), len(self.reward_errors), len(self.values)} != {count}:
            raise ValueError(f"rewards, reward_errors and values are not of {count} nodes")
        if len(set(self.order)) != count:
            raise ValueError("a key stands twice in the order")
        return self


class RestartLine(WireModel):
    """The tree is begun anew with other weights (`in_flight` is "restart"): forget all nodes before this line."""

    kind: Literal["restart"] = "restart"
    version: int = Field(ge=0, description="Weight version that it grows with now.")


class ErrorLine(WireModel):
    """The last line where there will be no tree."""

    kind: Literal["error"] = "error"
    problem: Problem


Line = NodeLine | RestartLine | TreeLine | ErrorLine
_LINES: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def child_key(parent: str, position: int) -> str:
    """Key of a node's child.

    >>> child_key("", 0), child_key("0.2", 1)
    ('0', '0.2.1')
    """
    return f"{parent}.{position}" if parent else str(position)


def parent_key(key: str) -> str | None:
    """Key of a node's parent; None for the prompt.

    >>> parent_key("0.2.1"), parent_key("0"), parent_key("")
    ('0.2', '', None)
    """
    return key.rpartition(".")[0] if key else None


def node_keys(parents: Sequence[int | None]) -> list[str]:
    """[N] keys of the nodes of a tree.

    Args:
        parents: [N] parent of each node, before it in the list; None for the prompt.

    >>> node_keys([None, 0, 1, 1, 0])
    ['', '0', '0.0', '0.1', '1']
    """
    keys: list[str] = []
    children = [0] * len(parents)
    for parent in parents:
        if parent is None:
            keys.append("")
        else:
            keys.append(child_key(keys[parent], children[parent]))
            children[parent] += 1
    return keys


def node_line(node: Node, key: str) -> NodeLine:
    """A node's line; what its line lacks comes with the tree's."""
    # Without validation, which would look at every token again: a node holds nothing that a line may not.
    return NodeLine.model_construct(
        kind="node", key=key, depth=node.depth, role=node.role, token_ids=node.token_ids,
        logprobs=node.logprobs, versions=node.versions, finish_reason=node.finish_reason, text=node.text,
    )  # fmt: skip


def tree_line(tree: RolloutTreeResponse, keys: Sequence[str]) -> TreeLine:
    """The last line of a tree.

    Args:
        tree: what was sampled, graded and valued.
        keys: [N] of its nodes, by id.
    """
    nodes = tree.nodes
    return TreeLine(
        request_id=tree.request_id,
        server_id=tree.server_id,
        model=tree.model,
        order=list(keys),
        rewards=[node.reward for node in nodes],
        reward_errors=[node.reward_error for node in nodes],
        values=[node.value for node in nodes],
        usage=tree.usage,
        weight_versions=tree.weight_versions,
        timing=tree.timing,
    )


def dump(line: Line) -> str:
    """A line as it is sent, with its end."""
    return line.model_dump_json() + "\n"


def lines(tree: RolloutTreeResponse) -> Iterator[str]:
    """All lines of a tree that is there already."""
    keys = node_keys([node.parent for node in tree.nodes])
    for node, key in zip(tree.nodes, keys, strict=True):
        yield dump(node_line(node, key))
    yield dump(tree_line(tree, keys))


class Assembler:
    """Makes the tree of its lines: the one that JSON would have given. Nodes may come in any order."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeLine] = {}
        self._ended = False

    @property
    def ended(self) -> bool:
        """Has the last line come? A stream that ends before has been cut off."""
        return self._ended

    def feed(self, line: str | bytes) -> NodeLine | RestartLine | RolloutTreeResponse:
        """Take one line, with its end or without.

        Returns:
            The node of a node's line; the line where the tree is begun anew; the whole tree of the last one.

        Raises:
            RequestError: the line says that there will be no tree; `status` says whether another try may help.
            TreeError: damaged, twice the same node, not all nodes at the end, nodes that make no tree.
        """
        if self._ended:
            raise TreeError("a line after the last one")
        try:
            parsed = _LINES.validate_json(line)
            match parsed:
                case NodeLine():
                    if parsed.key in self._nodes:
                        raise TreeError(f"node {parsed.key!r} came twice")
                    self._nodes[parsed.key] = parsed
                    return parsed
                case RestartLine():
                    self._nodes.clear()
                    return parsed
                case TreeLine():
                    self._ended = True
                    return self._assembled(parsed)
                case ErrorLine():
                    self._ended = True
                    raise parsed.problem.as_error()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "line"
            raise TreeError(f"a line that cannot be used: {where}: {first['msg']}") from None

    def _assembled(self, last: TreeLine) -> RolloutTreeResponse:
        missing = set(last.order).difference(self._nodes)
        if missing:
            raise TreeError(f"node {min(missing)!r} never came")
        if len(last.order) != len(self._nodes):
            stray = set(self._nodes).difference(last.order)
            raise TreeError(f"node {min(stray)!r} is not in the tree's order")
        ids = {key: position for position, key in enumerate(last.order)}
        parents = [None if key == "" else ids.get(parent_key(key) or "") for key in last.order]
        nodes = [self._node(last, position, parent) for position, parent in enumerate(parents)]
        rest = last.model_dump(include={"request_id", "server_id", "model"})
        tree = RolloutTreeResponse(
            nodes=nodes,
            usage=last.usage,
            weight_versions=last.weight_versions,
            timing=last.timing,
            **rest,
        )
        if node_keys(parents) != last.order:
            raise TreeError("siblings are not in the order of their keys, or one is missing")
        return tree

    def _node(self, last: TreeLine, position: int, parent: int | None) -> Node:
        line = self._nodes[last.order[position]]
        return Node(
            id=position,
            parent=parent,
            depth=line.depth,
            role=line.role,
            token_ids=line.token_ids,
            logprobs=line.logprobs,
            versions=line.versions,
            finish_reason=line.finish_reason,
            text=line.text,
            reward=last.rewards[position],
            reward_error=last.reward_errors[position],
            value=last.values[position],
        )
