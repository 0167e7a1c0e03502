"""Numbers of a whole tree as one array of bytes: exact, small, and fast to make and to read.

An array is little-endian and lies in byte planes: the lowest byte of every value, then the next of every value,
and so on. A float32's exponent and the upper bytes of token ids repeat, the rest is noise; in planes zstd finds
that out at its fastest level.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import TreeError
from shared.wire import WireModel
from shared.zstd import compress, content_size, decompress


class NumberType(StrEnum):
    """What a packed array's values are."""

    U16 = "u16"
    U24 = "u24"
    """Three bytes: the vocabularies of this time have between 2**16 and 2**18 tokens."""
    U32 = "u32"
    I64 = "i64"
    F32 = "f32"
    F64 = "f64"

    @property
    def is_integer(self) -> bool:
        """Are the values integers? Else they are floats."""
        return self not in (NumberType.F32, NumberType.F64)


_WIDTHS = {
    NumberType.U16: (2, "<u2"),
    NumberType.U24: (3, "<u4"),
    NumberType.U32: (4, "<u4"),
    NumberType.I64: (8, "<i8"),
    NumberType.F32: (4, "<f4"),
    NumberType.F64: (8, "<f8"),
}
"""(bytes of a value in the array, numpy type that it is computed in)."""
_INTEGERS = ((NumberType.U16, 1 << 16), (NumberType.U24, 1 << 24), (NumberType.U32, 1 << 32))


class PackedNumbers(WireModel):
    """One array."""

    type: NumberType
    data: bytes
    """The byte planes as one zstd frame that says how long it is."""

    def unpack(self, limit_bytes: int) -> list[Any]:
        """The values, of type int or float.

        Args:
            limit_bytes: most bytes of the array before compression.

        Raises:
            TreeError: damaged, too long, or no whole number of values.
        """
        width, dtype = _WIDTHS[self.type]
        size = content_size(self.data)
        if size is None or size % width:
            raise TreeError(
                f"a packed array of {size} bytes is no whole number of {self.type} values"
            )
        content = decompress(self.data, limit_bytes)
        planes = np.frombuffer(content, np.uint8).reshape(width, size // width)
        values = np.zeros((size // width, np.dtype(dtype).itemsize), np.uint8)
        values[:, :width] = planes.T
        unpacked: list[Any] = values.reshape(-1).view(dtype).tolist()
        return unpacked


def pack_integers(values: NDArray[np.int64]) -> PackedNumbers:
    """Token ids in the fewest bytes that hold them all.

    >>> pack_integers(np.array([7, 151_643])).type.value
    'u24'
    """
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    fitting = (number for number, end in _INTEGERS if high < end) if low >= 0 else iter(())
    return _pack(values, next(fitting, NumberType.I64))


def pack_floats(values: NDArray[np.float64]) -> PackedNumbers:
    """Log-probabilities as float32 where that loses nothing, which is what engines compute them in; else float64.

    >>> [pack_floats(np.array([value])).type.value for value in (-0.5, -0.1)]
    ['f32', 'f64']
    """
    with np.errstate(over="ignore"):  # what overflows is infinite, hence unequal
        exact = np.array_equal(values.astype(np.float32), values)
    return _pack(values, NumberType.F32 if exact else NumberType.F64)


def _pack(values: NDArray[Any], number: NumberType) -> PackedNumbers:
    width, dtype = _WIDTHS[number]
    converted = values.astype(dtype, copy=False)
    planes = converted.view(np.uint8).reshape(len(values), converted.itemsize).T[:width]
    return PackedNumbers(type=number, data=compress(planes.tobytes()))


def pack_texts(texts: Iterable[str | None]) -> tuple[list[int | None], bytes]:
    """([N] bytes of each text in UTF-8, None for None; all of them in one zstd frame)."""
    encoded = [None if text is None else text.encode() for text in texts]
    return [None if text is None else len(text) for text in encoded], compress(
        b"".join(text for text in encoded if text is not None)
    )


def unpack_texts(lengths: Iterable[int | None], data: bytes, limit_bytes: int) -> list[str | None]:
    """[N] texts, of what `pack_texts` made.

    Raises:
        TreeError: damaged, too long, no UTF-8, or the lengths do not add up.
    """
    content = decompress(data, limit_bytes)
    texts: list[str | None] = []
    end = 0
    try:
        for length in lengths:
            start, end = end, end + (length or 0)
            texts.append(None if length is None else content[start:end].decode())
    except UnicodeDecodeError as error:
        raise TreeError(f"a text is not UTF-8: {error}") from None
    if end != len(content):
        raise TreeError(f"texts of {end} bytes in {len(content)}")
    return texts
