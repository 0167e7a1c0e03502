"""From sampled branches to nodes on the wire: ids, texts, rewards at the leaves."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.branches import Branch, Place, walk
from server.rewards.pool import RewardPool
from server.rewards.registry import BUILT_IN
from server.tokens import Tokens
from shared.errors import RequestError
from shared.tree import FinishReason, Node, Role, RolloutTree
from shared.wire import Reward

T = TypeVar("T", bound=RolloutTree)

ABORTED = "the engine aborted this response"
_OURS = re.compile(
    rf"{ABORTED}|took longer than its limit of [\d.e+-]+ s|its process died \([\w ]+\)"
)
"""Errors that quote nothing of a reward function."""
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*)(?::|$)")
"""`ValueError: …`, as `rewards.worker` describes an exception."""


@dataclass(frozen=True, slots=True)
class Graded:
    """Reward of one leaf, and why its reward function failed if it did."""

    reward: float | None = None
    error: str | None = None


async def grade(
    root: Branch, tokens: Tokens, rewards: RewardPool, reward: Reward | None
) -> dict[Branch, Graded]:
    """Rewards of all leaves: of the whole response, never of the prompt; none where no reward is asked for.

    A leaf that stands below several nodes is graded once.
    """
    if reward is None:
        return {}
    unfinished = float(reward.options.get("unfinished", 0.0))
    leaves = dict.fromkeys(
        place.branch
        for place in walk(root)
        if place.parent is not None and not place.branch.children
    )
    finished: list[Branch] = []
    grades: dict[Branch, Graded] = {}
    for leaf in leaves:
        assert leaf.completion is not None, "only the prompt has no completion"
        if leaf.completion.finish_reason is FinishReason.STOP:
            finished.append(leaf)
        elif leaf.completion.finish_reason is FinishReason.LENGTH:
            grades[leaf] = Graded(unfinished)
        else:
            grades[leaf] = Graded(0.0, ABORTED)
    texts = [tokens.decode(leaf.response) for leaf in finished]
    with unquoted(reward):
        graded = await rewards.grade(reward.name, texts, reward.reference, reward.options)
    for leaf, given in zip(finished, graded, strict=True):
        grades[leaf] = Graded(given.reward, given.error)
    return grades


def wire_nodes(
    root: Branch,
    prompt: Sequence[int],
    grades: dict[Branch, Graded],
    tokens: Tokens | None,
) -> list[Node]:
    """The tree's nodes, parents first, depth first.

    Args:
        root: of the tree.
        prompt: [P] token ids.
        grades: of its leaves.
        tokens: decodes; None leaves the texts out.
    """
    texts: dict[Branch, str] = {}
    nodes: list[Node] = []
    for place in walk(root):
        branch = place.branch
        if branch.completion is None:
            text = tokens.decode(prompt) if tokens else None
            nodes.append(
                Node(
                    id=0,
                    parent=None,
                    depth=0,
                    role=Role.PROMPT,
                    token_ids=list(prompt),
                    text=text,
                )
            )
            continue
        if tokens and branch not in texts:
            texts[branch] = _text(branch, tokens)
        nodes.append(_node(len(nodes), place, grades.get(branch, Graded()), texts.get(branch)))
    return nodes


def _node(position: int, place: Place, graded: Graded, text: str | None) -> Node:
    branch = place.branch
    completion = branch.completion
    assert completion is not None, "only the prompt has no completion"
    return Node(
        id=position,
        parent=place.parent,
        depth=place.depth,
        role=branch.role,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        text=text,
        reward=graded.reward,
        reward_error=graded.error,
    )


def _text(branch: Branch, tokens: Tokens) -> str:
    """The part of the response's text that this branch adds: a character may span two branches' tokens."""
    head, whole = tokens.decode(branch.before), tokens.decode(branch.response)
    if whole.startswith(head):
        return whole[len(head) :]
    return tokens.decode(branch.response[len(branch.before) :])


def without_details(tree: T) -> T:
    """The tree for whoever may not see what reward functions say of their failures.

    The text of an exception is the function's own, and may quote the reference answer.
    """
    if all(node.reward_error is None for node in tree.nodes):
        return tree
    nodes = [
        node
        if node.reward_error is None
        else node.model_copy(update={"reward_error": error_kind(node.reward_error)})
        for node in tree.nodes
    ]
    return tree.model_copy(update={"nodes": nodes})


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
