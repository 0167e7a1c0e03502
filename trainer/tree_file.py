"""A rollout tree from a file: a saved answer of `/rollout_tree`, or one that somebody wrote by hand.

A hand-written tree says what it must and no more: parents, and rewards at the leaves. What follows from the rest
is filled in; what contradicts itself is refused in one line that names the node.
"""

import difflib
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from shared.errors import ConfigError
from shared.tree import Node, Role, RolloutTree

PLACEHOLDER = 0
"""Token that stands for a segment whose tokens the file leaves out: algorithms must not take it for empty."""
ROUNDING = 1e-3
"""How far above 0 an engine's rounding may take a log-probability, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTree:
    """A tree, and what its file says of where it comes from."""

    tree: RolloutTree
    tokenless: frozenset[int]
    """Segments without a `token_ids` of their own; the tree holds `PLACEHOLDER` in its place."""
    model: str | None
    """Checkpoint that sampled it, as the server names it."""
    server: str | None
    versions: str | None
    """Weight versions that sampled it, such as `3` or `3-4`."""

    @property
    def is_chain(self) -> bool:
        """True where rollouts estimate the values, which makes it a chain plan's."""
        return any(node.role is Role.ROLLOUT for node in self.tree.nodes)


def parse(text: str) -> SavedTree:
    """A tree from JSON: an object with `nodes`, or the list of nodes alone.

    Missing are filled in: `id` (the position), `depth`, `role`, and every field that a node may go without. A
    segment without `token_ids` keeps its place in every mean and has an advantage, but nothing to train.

    Raises:
        ConfigError: one line that says what is wrong, and with which node.

    >>> saved = parse('[{}, {"parent": 0, "token_ids": [7], "reward": 1}, {"parent": 0, "reward": 0}]')
    >>> [(node.id, str(node.role), node.depth, node.reward) for node in saved.tree.nodes]
    [(0, 'prompt', 0, None), (1, 'segment', 1, 1.0), (2, 'segment', 1, 0.0)]
    >>> sorted(saved.tokenless)
    [2]
    """
    try:
        raw = json.loads(text, parse_float=_finite, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    answer: Any = {"nodes": raw} if isinstance(raw, list) else raw
    listed = answer.get("nodes") if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        raise ConfigError('no "nodes": give an answer of /rollout_tree, or a list of nodes')
    if not listed:
        raise ConfigError('no nodes: "nodes" is empty; the first one is the prompt')
    nodes = _filled(listed)
    tokenless = frozenset(
        node["id"]
        for node in nodes
        if node["role"] == Role.SEGMENT and not node.keys() & {"token_ids", "logprobs", "versions"}
    )
    for position in tokenless:
        nodes[position]["token_ids"] = [PLACEHOLDER]
    return SavedTree(
        tree=_validated(answer.get("request_id", ""), nodes),
        tokenless=tokenless,
        model=_text(answer.get("model")),
        server=_text(answer.get("server_id")),
        versions=_versions(answer.get("weight_versions")),
    )


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return value


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _filled(listed: list[Any]) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = []
    depths: list[int] = []
    for position, given in enumerate(listed):
        if not isinstance(given, dict):
            raise ConfigError(f"node {position}: write an object, not {json.dumps(given)[:40]}")
        node: dict[str, Any] = {"id": position, "parent": None} | given
        if node["id"] != position:
            raise ConfigError(
                f"the node at position {position} has id {node['id']!r}; ids are positions, from 0"
            )
        parent = _parent(node, len(listed)) if position else None
        depths.append(0 if parent is None else depths[parent] + 1)
        role = Role.PROMPT if parent is None else Role.SEGMENT
        node = {"depth": depths[-1], "role": role} | node
        if (node["role"] == Role.PROMPT) != (position == 0):
            raise ConfigError(f"node {position}: the first node, and no other, is the prompt")
        if parent is not None and nodes[parent]["role"] == Role.ROLLOUT:
            raise ConfigError(f"node {position}: its parent {parent} is a rollout, which is a leaf")
        nodes.append(node)
    return nodes


def _parent(node: dict[str, Any], count: int) -> int:
    """The parent of a node other than the first: the id of an earlier node."""
    position, parent = node["id"], node["parent"]
    if parent is None:
        raise ConfigError(f"node {position}: no parent; only the first node, the prompt, has none")
    if type(parent) is not int:
        raise ConfigError(f"node {position}: parent {parent!r} is not the id of a node")
    if not 0 <= parent < count:
        raise ConfigError(f"node {position}: parent {parent} is not there; ids end at {count - 1}")
    if parent >= position:
        raise ConfigError(f"node {position}: parent {parent} does not come before it")
    return parent


def _validated(request_id: object, nodes: list[dict[str, Any]]) -> RolloutTree:
    try:
        # As JSON and strict: "1" is no reward and true is no token, but lists may be pairs.
        tree = RolloutTree.model_validate_json(
            json.dumps({"request_id": request_id, "nodes": nodes}), strict=True
        )
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    for node in tree.nodes:
        for position, logprob in enumerate(node.logprobs or []):
            if logprob > ROUNDING:
                raise ConfigError(
                    f"node {node.id}: logprobs[{position}] is {logprob:g}; "
                    "a log-probability is at most 0 (that of 0.9 is -0.105)"
                )
    return tree


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    message = str(first["msg"]).removeprefix("Value error, ")
    if where[:1] != ["nodes"] or len(where) < 3:  # a model's own check names its node itself
        return f"{'.'.join(where)}: {message}" if where[:1] != ["nodes"] and where else message
    node, name = f"node {where[1]}", where[2]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Node.model_fields, n=1, cutoff=0.0)[0]
        return f"{node}: unknown field {name!r}; the nearest known one is {near!r}"
    return f"{node}: {'.'.join(where[2:])}: {message}"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _versions(value: object) -> str | None:
    if not isinstance(value, dict) or not {"min", "max"} <= value.keys():
        return None
    low, high = value["min"], value["max"]
    return str(low) if low == high else f"{low}-{high}"
