"""Patch files for engines: of each changed tensor the places and the new values, in safetensors files.

How much changed is known only tensor by tensor, and a safetensors file begins with what is in it. So arrays wait
in spools, one for each width of an element, and the file is the head and the spools after it, the widest first:
each array then lies at a multiple of its width, which readers that map files ask for.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.content_file import unwritable
from shared.delta import Indices
from shared.shards import SHARD_BYTES
from shared.tensor_files import TensorInfo, bits_type, header

INDICES, VALUES = ".indices", ".values"
"""What follows a tensor's name in a patch."""
_IN_MEMORY = 1 << 22
"""Bytes of a spool beyond which it is a file."""
_WIDTHS = (8, 4, 2, 1)


class PatchWriter:
    """Writes a patch, one tensor in memory at a time; used in a `with` block.

    Args:
        folder: takes the files, `patch-00000.safetensors` and so on; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.files: list[Path] = []
        """What was written, once the block has ended; empty where nothing was."""
        self._folder = folder
        self._spools: dict[int, SpooledTemporaryFile[bytes]] = {}
        self._written: dict[int, list[TensorInfo]] = {}
        self._size = 0
        self._stack = ExitStack()

    def write(self, tensor: TensorInfo, indices: Indices, values: NDArray[Any]) -> None:
        """Write what changed in one tensor; nothing where nothing did.

        Args:
            tensor: which.
            indices: [n] places in the flattened tensor, ascending.
            values: [n] the new bits.

        Raises:
            WeightsError: the disk is full, say.
        """
        assert values.dtype == bits_type(tensor.dtype)
        assert values.shape == indices.shape
        if not indices.size:
            return
        if self._size and self._size + indices.nbytes + values.nbytes > SHARD_BYTES:
            self._end_file()
        index_dtype = "I32" if indices.itemsize == 4 else "I64"
        self._append(tensor.name + INDICES, index_dtype, indices)
        self._append(tensor.name + VALUES, tensor.dtype, values)

    def _append(self, name: str, dtype: str, array: NDArray[Any]) -> None:
        try:
            if not self._spools:
                self._open_spools()
            self._spools[array.itemsize].write(np.ascontiguousarray(array).view(np.uint8).data)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        info = TensorInfo(name=name, dtype=dtype, shape=array.shape)
        self._written[array.itemsize].append(info)
        self._size += array.nbytes

    def _open_spools(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for width in _WIDTHS:
            spool = SpooledTemporaryFile(_IN_MEMORY, dir=str(self._folder))  # noqa: SIM115 - the stack closes it
            self._spools[width] = self._stack.enter_context(spool)
            self._written[width] = []

    def _end_file(self) -> None:
        if not self._size:
            return
        path = self._folder / f"patch-{len(self.files):05d}.safetensors"
        try:
            with path.open("wb") as stream:
                stream.write(header(info for width in _WIDTHS for info in self._written[width]))
                for width in _WIDTHS:
                    self._spools[width].seek(0)
                    shutil.copyfileobj(self._spools[width], stream, 1 << 20)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        self._stack.close()
        self._spools = {}
        self._size = 0
        self.files.append(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if kind is None:
                self._end_file()
