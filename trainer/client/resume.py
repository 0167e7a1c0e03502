"""What attempts at one tree have returned: the next attempt gives it along, and its server grows only the rest."""

from collections.abc import Iterator

from shared.errors import RequestError
from shared.stream import NodeLine, parent_key
from shared.tree import FinishReason
from shared.wire import GivenNode, RolloutTreeRequest

MOST_BYTES = 8 << 20
"""Of given nodes in one request, roughly: half of what a server's body may have unless told otherwise. The rest is
sampled again."""
TOKEN_BYTES = 32
"""Of one token in JSON: its id, and its logprob in full."""
NODE_BYTES = 100


def refuses_nodes(error: RequestError) -> bool:
    """Is a request refused for its given nodes, so that it may be asked without them?"""
    return error.field.partition(".")[0] == "given" or (error.field, error.status) == ("body", 413)


class Kept:
    """The nodes of one tree, from all attempts so far."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeLine] = {}

    def add(self, node: NodeLine) -> None:
        """Take a node that has finished; where it is another than before, what was below is of no use."""
        before = self._nodes.get(node.key)
        if before is not None and before.token_ids != node.token_ids:
            for key in [key for key in self._nodes if key.startswith(f"{node.key}.")]:
                del self._nodes[key]
        self._nodes[node.key] = node

    def forget(self) -> None:
        """Drop everything: the tree is begun anew, or a server does not take it."""
        self._nodes.clear()

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def request(self, request: RolloutTreeRequest) -> RolloutTreeRequest:
        """The request with the nodes that are there, instead of those that it had, if there are any."""
        return request.model_copy(update={"given": list(self._given())}) if self else request

    def _given(self) -> Iterator[GivenNode]:
        """Parents first, and each with its parent, as far as the bytes go."""
        size, taken = 0, {""}
        for key in sorted(self._nodes, key=lambda key: key.count(".")):
            node = self._nodes[key]
            aborted = node.finish_reason in (None, FinishReason.ABORT)
            if aborted or not node.token_ids or parent_key(key) not in taken:
                continue
            size += NODE_BYTES + TOKEN_BYTES * len(node.token_ids)
            if size > MOST_BYTES:
                return
            taken.add(key)
            # Without validation, which would look at every token again: the line has been validated.
            yield GivenNode.model_construct(
                key=key,
                token_ids=node.token_ids,
                logprobs=node.logprobs or [],
                versions=node.versions,
                finish_reason="stop" if node.finish_reason is FinishReason.STOP else "length",
            )
