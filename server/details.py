"""What reward functions say of their failures may quote the reference answer, and that is for the owner alone."""

import contextlib
import re
from collections.abc import Iterator
from typing import TypeVar

from server.rewards.registry import BUILT_IN
from shared.errors import RequestError
from shared.tree import Node, RolloutTree
from shared.wire import Reward

T = TypeVar("T", bound=RolloutTree)

_OURS = re.compile(
    r"the engine aborted this response"
    r"|took longer than its limit of [\d.e+-]+ s"
    r"|its process died \([\w ]+\)"
)
"""Errors that quote nothing of a reward function."""
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*)(?::|$)")
"""`ValueError: …`, as `rewards.worker` describes an exception."""


def without_details(tree: T) -> T:
    """The tree for whoever lacks the scope `admin`: of an exception in a reward function, its kind alone."""
    if all(node.reward_error is None for node in tree.nodes):
        return tree
    return tree.model_copy(update={"nodes": [node_without_details(node) for node in tree.nodes]})


def node_without_details(node: Node) -> Node:
    """The same for one node, where they are sent one by one."""
    if node.reward_error is None:
        return node
    return node.model_copy(update={"reward_error": error_kind(node.reward_error)})


def error_kind(error: str) -> str:
    """A reward error without the text of its exception; what is of no known form is replaced whole.

    >>> error_kind("ValueError: the answer is 72"), error_kind("took longer than its limit of 5 s")
    ('ValueError', 'took longer than its limit of 5 s')
    >>> error_kind("no JSON behind 72")
    'the reward function failed'
    """
    if _OURS.fullmatch(error):
        return error
    named = _EXCEPTION.match(error)
    return named[1] if named else "the reward function failed"


@contextlib.contextmanager
def unquoted(reward: Reward) -> Iterator[None]:
    """A refusal of the user's own reward function inside, without the reference that it may quote.

    Raises:
        RequestError: the refusal.
    """
    try:
        yield
    except RequestError as error:
        quoted = bool(reward.reference) and reward.reference in f"{error.field} {error.detail}"
        if not quoted or reward.name in BUILT_IN:  # the built-in ones quote nothing
            raise
        raise RequestError(
            "reward",
            f"{reward.name} refuses the reference or the options; its text quotes the reference and is not shown",
            status=error.status,
        ) from None
