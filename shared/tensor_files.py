"""safetensors files read as bits, and the head of one that is written: no torch, nothing copied."""

import json
import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.digests import sha256
from shared.errors import WeightsError

_NAMES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
    2: ("U16", "I16", "F16", "BF16"),
    4: ("U32", "I32", "F32"),
    8: ("U64", "I64", "F64"),
}
"""Bytes of an element: types as safetensors writes them."""
_BITS: dict[str, np.dtype[Any]] = {
    name: np.dtype(f"<u{width}") for width, names in _NAMES.items() for name in names
}


def bits_type(dtype: str) -> np.dtype[Any]:
    """The unsigned integer that holds the bits of one element of a safetensors type.

    Raises:
        WeightsError: no type of this name, or none that whole bytes hold.
    """
    try:
        return _BITS[dtype]
    except KeyError:
        raise WeightsError(f"tensors of type {dtype} cannot be read") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor without its content."""

    name: str
    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many it has; 1 where the shape is empty."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its content."""
        return self.elements * bits_type(self.dtype).itemsize


def sha256_of(bits: NDArray[Any]) -> str:
    """Hexadecimal SHA-256 of a tensor's content."""
    return sha256(bits.view(np.uint8).data)


def header(tensors: Iterable[TensorInfo]) -> bytes:
    """The head of a safetensors file that holds the tensors in this order, without gaps."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the first tensor begins at a multiple of eight
    return struct.pack("<Q", len(text)) + text


class TensorFiles:
    """safetensors files of one version, mapped for reading; used in a `with` block.

    Args:
        paths: the files.

    Raises:
        WeightsError: a file is missing or damaged, or a tensor is in them twice.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[TensorInfo, mmap.mmap, int]] = {}
        for path in paths:
            try:
                self._map(path)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                struct.error,
            ) as error:
                raise WeightsError(
                    f"{path.name} is not a whole safetensors file: {error}"
                ) from None

    def _map(self, path: Path) -> None:
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack_from("<Q", data)
        if 8 + length > len(data):
            raise ValueError("its header is cut short")
        fields = json.loads(data[8 : 8 + length])
        fields.pop("__metadata__", None)
        for name, field in fields.items():
            info = TensorInfo(name=name, dtype=field["dtype"], shape=tuple(field["shape"]))
            begin, end = field["data_offsets"]
            if not 0 <= begin <= end <= len(data) - 8 - length:
                raise ValueError(f"tensor {name} lies outside the file")
            if min(info.shape, default=0) < 0 or end - begin != info.nbytes:
                raise ValueError(f"tensor {name} has other bytes than its shape")
            if name in self._places:
                raise ValueError(f"tensor {name} is there twice")
            self._places[name] = (info, data, 8 + length + begin)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the files hold, by name."""
        return {name: info for name, (info, _, _) in self._places.items()}

    def bits(self, name: str) -> NDArray[Any]:
        """[n] a tensor's elements as they lie in the file, read only."""
        info, data, begin = self._places[name]
        return np.frombuffer(data, bits_type(info.dtype), count=info.elements, offset=begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A map that is still looked at cannot be closed: it goes with its last view.
        self._places.clear()
