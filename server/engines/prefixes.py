"""Keys and values of token prefixes that were computed before: a radix tree, dropped from the oldest leaf on.

A rollout tree's prefixes are the paths of a radix tree, so each segment is kept once, however many rows pass it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor


class Segment:
    """Keys and values of a run of tokens that follows its parent's.

    Args:
        tokens: [T] token ids.
        states: [layers, 2, heads, T, dim] their keys and values.
        parent: the run before; None for the root, which has no tokens.
    """

    __slots__ = ("children", "parent", "states", "tokens")

    def __init__(
        self, tokens: tuple[int, ...], states: Tensor | None, parent: "Segment | None"
    ) -> None:
        self.tokens = tokens
        self.states = states
        self.parent = parent
        self.children: dict[int, Segment] = {}
        """By first token."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 0 if self.states is None else self.states.nbytes


class PrefixStore:
    """Longest-prefix look-up of keys and values.

    Args:
        budget: most bytes to keep.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._root = Segment((), None, None)
        # Oldest use first. Whoever uses a segment uses its ancestors too, and they are stamped after it: the
        # oldest one never has children.
        self._ages: OrderedDict[Segment, None] = OrderedDict()
        self.nbytes = 0

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        # Parents and children hold one another: their memory would stay until a full garbage collection, which a
        # server may not see in a hundred versions.
        for segment in self._ages:
            segment.parent = None
        self._root.children.clear()
        self._ages.clear()
        self.nbytes = 0

    def match(self, tokens: Sequence[int]) -> list[tuple[Segment, int]]:
        """The longest stored prefix of `tokens`, as (segment, how many of its tokens).

        Only the last segment may match in part.
        """
        path: list[tuple[Segment, int]] = []
        node, at = self._root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            common = _common(child.tokens, tokens, at)
            path.append((child, common))
            at += common
            if common < len(child.tokens):
                break
            node = child
        if path:
            self._stamp(path[-1][0])
        return path

    def put(self, tokens: Sequence[int], read: Callable[[int, int], Tensor]) -> None:
        """Keep the keys and values of `tokens`.

        Args:
            tokens: [T] the whole path from the first token of the prompt.
            read: gives [layers, 2, heads, stop - start, dim] of positions start to stop, in memory of its own;
                asked only for what is not stored yet.
        """
        path = self.match(tokens)
        at = sum(count for _, count in path)
        if at == len(tokens):
            return
        node = self._root
        if path:
            node, count = path[-1]
            if count < len(node.tokens):
                node = self._split(node, count)
        child = Segment(tuple(tokens[at:]), read(at, len(tokens)), node)
        node.children[child.tokens[0]] = child
        self.nbytes += child.nbytes
        self._stamp(child)
        while self.nbytes > self._budget:
            self._evict()

    def _split(self, lower: Segment, count: int) -> Segment:
        """Cut `lower` after `count` tokens; returns the new upper part."""
        parent, states = lower.parent, lower.states
        assert parent is not None, "the root is never split"
        assert states is not None, "only the root has none"
        # Copies: a view of one half would keep the other half's memory alive after its eviction.
        upper = Segment(lower.tokens[:count], states[..., :count, :].clone(), parent)
        lower.tokens, lower.states = lower.tokens[count:], states[..., count:, :].clone()
        lower.parent = upper
        parent.children[upper.tokens[0]] = upper
        upper.children[lower.tokens[0]] = lower
        self._stamp(upper)
        return upper

    def _stamp(self, node: Segment | None) -> None:
        """Mark a segment and then its ancestors as used just now."""
        while node is not None and node.parent is not None:
            self._ages[node] = None
            self._ages.move_to_end(node)
            node = node.parent

    def _evict(self) -> None:
        """Drop the leaf that was used longest ago."""
        oldest, _ = self._ages.popitem(last=False)
        assert oldest.parent is not None, "the root has no age"
        assert not oldest.children, "ancestors are stamped last"
        del oldest.parent.children[oldest.tokens[0]]
        self.nbytes -= oldest.nbytes


def _common(segment: tuple[int, ...], tokens: Sequence[int], start: int) -> int:
    """Length of the longest common prefix of `segment` and `tokens[start:]`.

    >>> _common((1, 2, 3), (0, 1, 2, 4), 1)
    2
    """
    if segment == tuple(tokens[start : start + len(segment)]):
        return len(segment)
    # Not strict: either may end first.
    pairs = zip(segment, tokens[start:], strict=False)
    count = 0
    for ours, theirs in pairs:
        if ours != theirs:
            break
        count += 1
    return count
