"""What changed between two versions of a tensor, to the bit and small.

Only changed elements are kept: where they lie, and by how much each moved. Bits are compared, not numbers, so
NaN, infinities, denormals and -0.0 come back as they were.

**How far.** Read as an ordered integer, a float's bits grow with its value, and the next float is one more. A step
of training moves most weights that move at all by one: the difference is +1 or -1, whatever the weight.
Differences are folded to 0, 1, 2, … (-1, +1, -2, …) and laid in byte planes; zstd finds that the upper bytes are
zero.

**Where.** A weight moves where the step is not small against the distance to the next float, which grows with the
weight. The decoder holds the base too, so both sides order the elements of small magnitude (below a limit that the
encoder chooses and writes down) by it: in that order nearly all of the first ones have changed and hardly any of
the last, and the gaps between the changed ones cost next to nothing. Elements above the limit keep their order.

A tensor is coded in segments of `SEGMENT` elements, which bounds what encoder and decoder need beside it. A blob:

    "SpD1", width of an element in bytes (u8), elements (u64), then for each segment
    changed below the limit (u32), changed above it (u32), the limit (u16),
    byte planes of the gaps below, of the gaps above, of the differences (u8 each), length of the frame (u32),
    one zstd frame: gaps below, gaps above, differences

all little endian. The blob is not trusted: sizes are bounded by the base's before anything is allocated. It does
not prove that the base is the right one; a hash of the result does that.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from shared.delta_streams import (
    Bits,
    choose_limit,
    coarse_magnitudes,
    find,
    fold,
    from_planes,
    gaps_between,
    ordered_below,
    places_after,
    places_where,
    to_planes,
    unfold,
)
from shared.errors import WeightsError

Indices = NDArray[np.signedinteger[Any]]

SEGMENT = 1 << 24
"""Elements coded together."""
MOST_INT32 = (1 << 31) - 1
"""Elements that int32 indices reach; a tensor of more gets int64."""
LEVEL = 3
"""Of zstd: higher ones gain a hundredth and take their time."""
_MAGIC = b"SpD1"
_HEAD = struct.Struct("<4sBQ")
_SEGMENT_HEAD = struct.Struct("<IIHBBBI")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patch:
    """New values of some elements of one tensor."""

    indices: Indices
    """[n] places in the flattened tensor, ascending; int64 where int32 does not reach."""
    values: Bits
    """[n] the bits that belong there: absolute, so that writing them twice is harmless."""

    def write_into(self, target: Bits) -> None:
        """Overwrite the elements of a tensor's bits, in place."""
        target[self.indices] = self.values


def index_type(elements: int) -> type[np.int32] | type[np.int64]:
    """The narrowest type for places in a tensor of so many elements."""
    return np.int32 if elements <= MOST_INT32 else np.int64


def encode(base: Bits, new: Bits) -> bytes | None:
    """The blob that turns `base` into `new`; None where they are equal.

    Args:
        base: [n] bits of the tensor that the receiver holds.
        new: [n] bits of the same type.

    >>> blob = encode(np.array([1, 2, 3], np.uint16), np.array([1, 5, 3], np.uint16))
    >>> patch = decode(blob, np.array([1, 2, 3], np.uint16))
    >>> patch.indices.tolist(), patch.values.tolist()
    ([1], [5])
    """
    assert base.shape == new.shape == (base.size,)
    assert base.dtype == new.dtype
    assert base.dtype.kind == "u"
    parts = [_encode_segment(base[part], new[part]) for part in _segments(base.size)]
    if not any(parts):
        return None
    nothing = _SEGMENT_HEAD.pack(*[0] * 7)
    head = _HEAD.pack(_MAGIC, base.itemsize, base.size)
    return head + b"".join(part or nothing for part in parts)


def decode(blob: bytes | memoryview, base: Bits) -> Patch:
    """What a blob changes in `base`.

    Args:
        blob: made by `encode` against these very bits; untrusted.
        base: [n] bits, contiguous.

    Raises:
        WeightsError: damaged, or for a tensor of another size or type.
    """
    blob = memoryview(blob)
    if len(blob) < _HEAD.size:
        raise WeightsError("a delta that is cut short")
    magic, width, elements = _HEAD.unpack_from(blob)
    if magic != _MAGIC:
        raise WeightsError("not a delta of this format")
    if (width, elements) != (base.itemsize, base.size):
        raise WeightsError(
            f"a delta of {elements} elements of {width} bytes, for a tensor of {base.size} of {base.itemsize}"
        )
    at = _HEAD.size
    indices, values = [], []
    for part in _segments(base.size):
        found, at = _decode_segment(blob, at, base[part])
        indices.append(_shifted(found.indices, part.start, base.size))
        values.append(found.values)
    if at != len(blob):
        raise WeightsError("a delta with something behind its end")
    return Patch(
        indices=np.concatenate(indices) if indices else np.empty(0, np.int32),
        values=np.concatenate(values) if values else base[:0].copy(),
    )


def _shifted(places: Indices, start: int, elements: int) -> Indices:
    """Places in a segment as places in its tensor."""
    shifted: Indices = places.astype(index_type(elements))
    shifted += shifted.dtype.type(start)
    return shifted


def _segments(elements: int) -> Iterator[slice]:
    for start in range(0, elements, SEGMENT):
        yield slice(start, min(start + SEGMENT, elements))


def _encode_segment(base: Bits, new: Bits) -> bytes | None:
    changed = places_where(lambda part: base[part] != new[part], base.size)
    if not changed.size:
        return None
    old = base.take(changed)
    coarse = coarse_magnitudes(old)
    limit = choose_limit(base, coarse)
    below = ordered_below(base, limit)
    new_below = new.take(below.places)
    ranks = find((below.bits != new_below).take(below.order))
    first, rest = below.order.take(ranks), find(coarse >= limit)
    above = changed.take(rest)
    moved = fold(
        np.concatenate([below.bits.take(first), old.take(rest)]),
        np.concatenate([new_below.take(first), new.take(above)]),
    )
    streams = [gaps_between(ranks), gaps_between(above), moved]
    packed = [to_planes(stream) for stream in streams]
    raw = b"".join(data for data, _ in packed)
    frame = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False).compress(raw)
    widths = [width for _, width in packed]
    return _SEGMENT_HEAD.pack(ranks.size, above.size, limit, *widths, len(frame)) + frame


def _decode_segment(blob: memoryview, at: int, base: Bits) -> tuple[Patch, int]:
    if len(blob) < at + _SEGMENT_HEAD.size:
        raise WeightsError("a delta that is cut short")
    small, large, limit, *widths, length = _SEGMENT_HEAD.unpack_from(blob, at)
    at += _SEGMENT_HEAD.size
    counts = (small, large, small + large)
    if (
        small + large > base.size
        or limit > 255
        or widths[0] > 4
        or widths[1] > 4
        or widths[2] > base.itemsize
    ):
        raise WeightsError("a delta that names more than its tensor has")
    if length > len(blob) - at:
        raise WeightsError("a delta that is cut short")
    sizes = [count * width for count, width in zip(counts, widths, strict=True)]
    raw = _decompress(blob[at : at + length], sum(sizes)) if length else b""
    if len(raw) != sum(sizes):
        raise WeightsError("a delta whose content has another length than it says")
    streams, start = [], 0
    for count, width in zip(counts, widths, strict=True):
        streams.append(from_planes(raw, start, count, width))
        start += count * width
    places, folded = places_after(streams[1], base.size), streams[2]
    if small:
        below, folded_below = _below(base, limit, streams[0], folded[:small])
        places = np.concatenate([below, places])
        # Two runs that ascend: a stable sort finds them and merges.
        order = np.argsort(places, kind="stable")
        places = places.take(order)
        folded = np.concatenate([folded_below, folded[small:]]).take(order)
        if (places[1:] == places[:-1]).any():
            raise WeightsError("a delta that names an element twice")
    values = unfold(base.take(places), folded.astype(base.dtype))
    return Patch(indices=places, values=values), at + length


def _below(base: Bits, limit: int, gaps: Bits, folded: Bits) -> tuple[Indices, Bits]:
    """The changed places below the limit, ascending, and how far each moved; both are coded by magnitude."""
    places, _, order = ordered_below(base, limit)
    chosen = order.take(places_after(gaps, places.size))
    # Laid out over all places and found again: several times as fast as sorting.
    mask, moves = np.zeros(places.size, np.bool_), np.empty(places.size, folded.dtype)
    mask[chosen] = True
    moves[chosen] = folded
    ascending = find(mask)
    return places.take(ascending), moves.take(ascending)


def _decompress(frame: memoryview, size: int) -> bytes:
    """A frame's content; hardly more than `size` bytes are ever allocated."""
    try:
        # A frame that claims a size makes zstandard allocate that much, whatever limit it is given.
        if zstandard.frame_content_size(frame) >= 0:
            raise WeightsError("a delta that claims a size of its own")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            frame, max_output_size=max(size, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise WeightsError(f"a damaged delta: {error}") from None
