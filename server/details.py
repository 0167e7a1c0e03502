"""What reward functions say of their failures may quote the reference answer, and that is for the owner alone."""

import contextlib
import re
from collections.abc import Iterator
from typing import TypeVar

from starlette.requests import HTTPConnection

from server.auth import Scope, granted
from server.rewards.registry import BUILT_IN
from shared.errors import RequestError
from shared.tree import Node, RolloutTree
from shared.wire import Reward

T = TypeVar("T", bound=RolloutTree)

_KINDS = re.compile(
    r"the engine aborted this response"
    r"|took longer than its limit of [\d.e+-]+ s"
    r"|returned (?:nan|-?inf|[A-Za-z_]\w*), not a finite number"
    r"|its process (?:died \([\w ]+\)|wrote where only its worker may"
    r"|closed files that it did not open|cannot be kept running)"
    r"|left processes running"
    r"|the reward pool is closed"
    r"|the reward server (?:took longer than [\d.e+-]+ s|answered \d{3}|answers nobody)"
    r"|not sent: for an earlier batch of this tree"
    r"|[A-Za-z_]\w*(?:Error|Exception|Exit|Interrupt|Warning)(?=:|$)"
)
"""How errors begin that quote nothing; the last is an exception's name, as `rewards.worker` writes it."""


def for_caller(request: HTTPConnection, tree: T) -> T:
    """The tree as the sender of a request may see it."""
    return tree if Scope.ADMIN in granted(request) else without_details(tree)


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
    """What kind a reward error is of, without the text behind it; what is of no known kind is replaced whole.

    >>> error_kind("ValueError: the answer is 72"), error_kind("took longer than its limit of 5 s")
    ('ValueError', 'took longer than its limit of 5 s')
    >>> error_kind("no JSON behind 72")
    'the reward function failed'
    """
    known = _KINDS.match(error)
    return known[0] if known else "the reward function failed"


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
