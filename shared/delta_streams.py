"""The streams of a delta: which elements changed, in an order that makes it cheap to say, and by how much.

See `shared.delta` for the reasons. Everything here is about one segment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import WeightsError

Bits = NDArray[Any]
"""[n] a tensor's elements as unsigned integers of their width, flattened row major."""

_ORDERED_SHARE = 16
"""At most about one element in so many is ordered by magnitude: ordering takes time."""
_ORDERING_COSTS = 0.05
"""Bits that ordering an element must save on average."""
_SAMPLES = 1 << 13
"""Elements of a segment that are looked at to choose a limit."""
_BLOCK = 1 << 20
"""Elements compared at once."""


def _magnitude(bits: Bits) -> Bits:
    """Without the sign, one place to the left: in the order of the absolute values."""
    doubled: Bits = bits << bits.dtype.type(1)
    return doubled


def coarse_magnitudes(bits: Bits) -> NDArray[np.uint8]:
    """The eight bits after the sign: of bfloat16 and float32 the exponent."""
    upper: Bits = _magnitude(bits) >> bits.dtype.type(8 * bits.itemsize - 8)
    return upper.astype(np.uint8)


class Ordered(NamedTuple):
    """The elements of small magnitude, and their order by it."""

    places: NDArray[np.int64]
    """[n] ascending."""
    bits: Bits
    """[n] what lies there."""
    order: NDArray[np.int64]
    """[n] `places[order]` has rising magnitudes, and rising places among equal ones."""


def ordered_below(base: Bits, limit: int) -> Ordered:
    """The elements with a coarse magnitude below `limit`."""
    bound = base.dtype.type(limit << (8 * base.itemsize - 8))
    places = places_where(lambda part: _magnitude(base[part]) < bound, base.size)
    bits = base.take(places)
    keys = _magnitude(bits)
    if base.itemsize > 2:  # sixteen bits say enough, and sort by radix
        keys = (keys >> base.dtype.type(8 * base.itemsize - 16)).astype(np.uint16)
    return Ordered(places, bits, np.argsort(keys, kind="stable"))


def find(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Places where a mask is set: by words of eight where few are."""
    if np.count_nonzero(mask) * 12 > mask.size:
        return np.flatnonzero(mask)
    whole = mask.size & ~7
    words = mask[:whole].view(np.uint64)
    busy = np.flatnonzero(words != 0)
    inner = np.flatnonzero(words.take(busy).view(np.bool_))
    places = (busy.take(inner >> 3) << 3) + (inner & 7)
    if whole == mask.size:
        return places
    return np.concatenate([places, whole + np.flatnonzero(mask[whole:])])


def places_where(mask: Callable[[slice], NDArray[np.bool_]], size: int) -> NDArray[np.int64]:
    """Places where a mask is set that is computed in blocks, each of which stays in the processor's cache."""
    blocks = (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))
    found = [find(mask(block)) + block.start for block in blocks]
    return np.concatenate(found)


def _entropy(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits to say which `part` of `whole` elements it is, where any is as likely."""
    rest = whole - part
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = whole * np.log2(whole) - part * np.log2(part) - rest * np.log2(rest)
    return np.where((part > 0) & (rest > 0), bits, 0.0)


def choose_limit(base: Bits, coarse: NDArray[np.uint8]) -> int:
    """The coarse magnitude below which ordering saves most bits, by a sample of the base."""
    step = -(-base.size // _SAMPLES) | 1  # odd: no column of a matrix is all that is looked at
    sample = np.bincount(coarse_magnitudes(base[::step]), minlength=256) * float(step)
    changed = np.bincount(coarse, minlength=256).astype(np.float64)
    whole = np.maximum(sample, changed)
    before = np.concatenate([[0.0], np.cumsum(_entropy(changed, whole))])
    changed_above = np.concatenate([[0.0], np.cumsum(changed)])
    whole_below = np.concatenate([[0.0], np.cumsum(whole)])
    bits = before + _entropy(changed_above[-1] - changed_above, np.full(257, whole_below[-1]))
    bits += _ORDERING_COSTS * whole_below
    bits[1:][whole_below[1:] > base.size / _ORDERED_SHARE] = np.inf
    return int(np.argmin(bits[:256]))


def gaps_between(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many elements lie between each place and the one before."""
    return np.diff(places, prepend=-1) - 1


def places_after(gaps: Bits, end: int) -> NDArray[np.int64]:
    """The places with these gaps before them.

    Raises:
        WeightsError: one is not below `end`.
    """
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if places.size and places[-1] >= end:
        raise WeightsError("a delta that names more than its tensor has")
    return places


def _ordered(bits: Bits) -> Bits:
    """Float bits as integers that grow with the value, -0.0 just below 0.0."""
    top = 8 * bits.itemsize - 1
    negative = bits >> bits.dtype.type(top)
    ordered: Bits = bits ^ ((bits.dtype.type(0) - negative) | bits.dtype.type(1 << top))
    return ordered


def _from_ordered(integers: Bits) -> Bits:
    top = 8 * integers.itemsize - 1
    positive = integers >> integers.dtype.type(top)
    bits: Bits = integers ^ ((positive - integers.dtype.type(1)) | integers.dtype.type(1 << top))
    return bits


def fold(base: Bits, new: Bits) -> Bits:
    """Differences, none of them zero, as 0, 1, 2, … for -1, +1, -2, …, modulo the type."""
    one, top = base.dtype.type(1), base.dtype.type(8 * base.itemsize - 1)
    difference = _ordered(new) - _ordered(base)
    sign = base.dtype.type(0) - (difference >> top)
    folded: Bits = ((difference << one) ^ sign) - one
    return folded


def unfold(base: Bits, folded: Bits) -> Bits:
    """The new bits, of what `fold` made against the same base."""
    one = base.dtype.type(1)
    coded = folded + one
    difference = (coded >> one) ^ (base.dtype.type(0) - (coded & one))
    return _from_ordered(_ordered(base) + difference)


def to_planes(values: NDArray[Any]) -> tuple[bytes, int]:
    """Byte planes, the lowest first, and how many there are: none where all values are zero."""
    width = (int(values.max(initial=0)).bit_length() + 7) // 8
    planes = ((values >> values.dtype.type(8 * plane)).astype(np.uint8) for plane in range(width))
    return b"".join(plane.tobytes() for plane in planes), width


def from_planes(raw: bytes, start: int, count: int, width: int) -> Bits:
    """So many values of what `to_planes` made, from the place where it lies in `raw`."""
    values: Bits = np.zeros(count, np.uint32 if width <= 4 else np.uint64)
    kind = values.dtype.type
    for plane in range(width):
        row: Bits = np.frombuffer(raw, np.uint8, count, start + plane * count).astype(kind)
        values |= row << kind(8 * plane)
    return values
