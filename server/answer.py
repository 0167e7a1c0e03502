"""From sampled branches to nodes on the wire: ids, texts, rewards at the leaves."""

from collections.abc import Mapping, Sequence

from server.branches import Branch, Place, walk
from server.grading import Graded
from server.tokens import Tokens
from shared.stream import NodeLine, node_line
from shared.tree import Node, Role


def wire_nodes(
    root: Branch,
    prompt: Sequence[int],
    grades: Mapping[Branch, Graded],
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


def branch_line(path: Sequence[int], branch: Branch, tokens: Tokens | None) -> NodeLine:
    """A finished branch as a line of a stream.

    Args:
        path: sibling positions from the prompt.
        branch: not the prompt.
        tokens: decodes; None leaves the text out.
    """
    place = Place(branch, None, len(path))
    text = _text(branch, tokens) if tokens else None
    return node_line(_node(0, place, Graded(), text), ".".join(map(str, path)))


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
