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

from shared.errors import WeightsError

Bits = NDArray[Any]
"""[n] a tensor's elements as unsigned integers of their width, flattened row major."""
Indices = NDArray[np.signedinteger[Any]]

SEGMENT = 1 << 24
"""Elements coded together."""
MOST_INT32 = (1 << 31) - 1
"""Elements that int32 indices reach; a tensor of more gets int64."""
LEVEL = 3
_ORDERED_SHARE = 16
"""At most about one element in so many is ordered by magnitude: ordering costs time."""
_SAMPLES = 1 << 16
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
    changed = base != new
    places = np.flatnonzero(changed)
    if not places.size:
        return None
    coarse = _coarse(base[places])
    limit = _choose_limit(base, coarse)
    below = _ordered_below(base, limit) if limit else places[:0]
    ranks = np.flatnonzero(changed[below])
    above = places[coarse >= limit]
    moved = np.concatenate([below[ranks], above])
    streams = [_gaps(ranks), _gaps(above), _folded(base[moved], new[moved])]
    planes = [_planes(stream) for stream in streams]
    raw = b"".join(data for data, _ in planes)
    frame = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False).compress(raw)
    widths = [width for _, width in planes]
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
        streams.append(_from_planes(raw, start, count, width))
        start += count * width
    below = _ordered_below(base, limit) if small else np.empty(0, np.int64)
    indices = np.concatenate(
        [below[_places(streams[0], below.size)], _places(streams[1], base.size)]
    )
    values = _unfolded(base[indices], streams[2].astype(base.dtype))
    if small:
        order = np.argsort(indices)
        indices, values = indices[order], values[order]
        if (indices[1:] == indices[:-1]).any():
            raise WeightsError("a delta that names an element twice")
    return Patch(indices=indices, values=values), at + length


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


def _magnitude(bits: Bits) -> Bits:
    """Without the sign, one place to the left: in the order of the absolute values."""
    doubled: Bits = bits << bits.dtype.type(1)
    return doubled


def _coarse(bits: Bits) -> NDArray[np.uint8]:
    """The eight bits after the sign: of bfloat16 and float32 the exponent."""
    upper: Bits = _magnitude(bits) >> bits.dtype.type(8 * bits.itemsize - 8)
    return upper.astype(np.uint8)


def _ordered_below(base: Bits, limit: int) -> NDArray[np.int64]:
    """Places of the elements with a coarse magnitude below `limit`, by rising magnitude, then by place."""
    magnitude = _magnitude(base)
    places = np.flatnonzero(magnitude < base.dtype.type(limit << (8 * base.itemsize - 8)))
    keys = magnitude[places]
    if base.itemsize > 2:  # sixteen bits say enough, and sort by radix
        keys = (keys >> base.dtype.type(8 * base.itemsize - 16)).astype(np.uint16)
    return places[np.argsort(keys, kind="stable")]


def _entropy(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits to say which `part` of `whole` elements it is, where any is as likely."""
    rest = whole - part
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = whole * np.log2(whole) - part * np.log2(part) - rest * np.log2(rest)
    return np.where((part > 0) & (rest > 0), bits, 0.0)


def _choose_limit(base: Bits, coarse: NDArray[np.uint8]) -> int:
    """The coarse magnitude below which ordering saves most bits, by a sample of the base."""
    step = -(-base.size // _SAMPLES) | 1  # odd: no column of a matrix is all that is looked at
    sample = np.bincount(_coarse(base[::step]), minlength=256) * float(step)
    changed = np.bincount(coarse, minlength=256).astype(np.float64)
    whole = np.maximum(sample, changed)
    before = np.concatenate([[0.0], np.cumsum(_entropy(changed, whole))])
    changed_above = np.concatenate([[0.0], np.cumsum(changed)])
    whole_below = np.concatenate([[0.0], np.cumsum(whole)])
    bits = before + _entropy(changed_above[-1] - changed_above, np.full(257, whole_below[-1]))
    bits[1:][whole_below[1:] > base.size / _ORDERED_SHARE] = np.inf
    return int(np.argmin(bits[:256]))


def _gaps(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many elements lie between each place and the one before."""
    return np.diff(places, prepend=-1) - 1


def _places(gaps: Bits, end: int) -> NDArray[np.int64]:
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if places.size and places[-1] >= end:
        raise WeightsError("a delta that names more than its tensor has")
    return places


def _ordered(bits: Bits) -> Bits:
    """Float bits as integers that grow with the value; its own kind of two's complement."""
    top = 8 * bits.itemsize - 1
    negative = bits >> bits.dtype.type(top)
    ordered: Bits = bits ^ ((bits.dtype.type(0) - negative) | bits.dtype.type(1 << top))
    return ordered


def _from_ordered(integers: Bits) -> Bits:
    top = 8 * integers.itemsize - 1
    positive = integers >> integers.dtype.type(top)
    bits: Bits = integers ^ ((positive - integers.dtype.type(1)) | integers.dtype.type(1 << top))
    return bits


def _folded(base: Bits, new: Bits) -> Bits:
    """Differences, none of them zero, as 0, 1, 2, … for -1, +1, -2, …, modulo the type."""
    one, top = base.dtype.type(1), base.dtype.type(8 * base.itemsize - 1)
    difference = _ordered(new) - _ordered(base)
    sign = base.dtype.type(0) - (difference >> top)
    folded: Bits = ((difference << one) ^ sign) - one
    return folded


def _unfolded(base: Bits, folded: Bits) -> Bits:
    one = base.dtype.type(1)
    coded = folded + one
    difference = (coded >> one) ^ (base.dtype.type(0) - (coded & one))
    return _from_ordered(_ordered(base) + difference)


def _planes(values: NDArray[Any]) -> tuple[bytes, int]:
    """Byte planes, the lowest first, and how many there are: none where all values are zero."""
    width = (int(values.max(initial=0)).bit_length() + 7) // 8
    rows = values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    return rows.reshape(values.size, values.itemsize).T[:width].tobytes(), width


def _from_planes(raw: bytes, start: int, count: int, width: int) -> Bits:
    values: Bits = np.zeros(count, np.uint32 if width <= 4 else np.uint64)
    kind = values.dtype.type
    for plane in range(width):
        row: Bits = np.frombuffer(raw, np.uint8, count, start + plane * count).astype(kind)
        values |= row << kind(8 * plane)
    return values
