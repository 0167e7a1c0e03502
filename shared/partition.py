"""Partitions: where the segments of a response begin (DESIGN.md section 4; arXiv 2505.23564).

A boundary is a position b, 0 <= b < T, in a response of T tokens: it stands between token b - 1 and token b. Its
state is the prompt and the response's first b tokens; 0 is the prompt alone. Boundaries are sorted and unique.

Whether a boundary stands at b depends on the tokens up to b and on nothing behind it, so boundaries may be placed
while a response still grows: those of its first t tokens are those of the whole response below t.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from shared.wire import CutpointsPartition, DelimiterPartition, FixedPartition, Partition


def boundaries(
    partition: Partition, logprobs: Sequence[float], pieces: Sequence[str] = ()
) -> list[int]:
    """Where the segments of one response begin.

    Args:
        partition: of the plan.
        logprobs: [T] behaviour log-probability (nats) of each token.
        pieces: [T] the text that each token adds, empty where it only begins a character; read by `delimiter`
            alone, others do without.

    Returns:
        Sorted positions from 0 to T - 1; none for a response without tokens.

    >>> boundaries(FixedPartition(tokens=2), [-1.0] * 5)
    [0, 2, 4]
    """
    match partition:
        case FixedPartition(tokens=tokens):
            return list(range(0, len(logprobs), tokens))
        case CutpointsPartition(threshold=threshold, interval=interval):
            return cutpoints(logprobs, threshold)[::interval]
        case DelimiterPartition(delimiter=delimiter):
            assert len(pieces) == len(logprobs), "a delimiter is looked for in every token's text"
            return steps(pieces, delimiter)
        case _:
            return [0][: len(logprobs)]


def cutpoints(logprobs: Sequence[float], threshold: float) -> list[int]:
    """U, the positions of tokens whose behaviour probability is strictly below `threshold`.

    Compared as logarithms, like the probability mask: a probability of exactly the threshold stays out.

    >>> cutpoints([math.log(p) for p in (0.95, 0.9, 0.5, 0.3)], threshold=0.9)
    [2, 3]
    """
    below = math.log(threshold)
    return [t for t, logprob in enumerate(logprobs) if logprob < below]


def steps(pieces: Sequence[str], delimiter: str) -> list[int]:
    """The first position, and each one behind a token in which an occurrence of `delimiter` ends.

    Occurrences are counted from the left and do not overlap. Several may end in one token, which gives one
    boundary; one may span tokens; one that ends with the last token gives none.

    >>> steps(["1+1", "=2.\\n", "2", "+2.", "\\n", "4"], "\\n")
    [0, 2, 5]
    """
    text = "".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    found = [0][: len(pieces)]
    at = 0
    while (at := text.find(delimiter, at)) >= 0:
        at += len(delimiter)
        behind = bisect_left(ends, at) + 1
        if found[-1] < behind < len(pieces):
            found.append(behind)
    return found


def segments(boundaries: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The segments of a response, as [start, end): they tile it, and none is empty.

    The tokens before the first boundary are a segment too.

    Args:
        boundaries: sorted, from 0 to length - 1.
        length: T, tokens of the response.

    >>> segments([2, 5], 7)
    [(0, 2), (2, 5), (5, 7)]
    """
    return list(pairwise(sorted({0, *boundaries, length})))
