"""A full version's files: canonical safetensors shards, written and hashed without torch.

The writer is deterministic: the same tensors give the same files to the byte, whoever writes them and in whatever
order they come to know of them. A server that rebuilt an anchor from deltas has the very files that its trainer
published, and may hand them on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.content_file import ContentFile
from shared.manifest import FileEntry
from shared.tensor_files import TensorInfo, bits_type, header

SHARD_BYTES = 2 << 30
"""Most bytes of one file's tensors, unless a single one is larger."""


def canonical_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """How shards hold tensors: wide elements first, so that each lies at a multiple of its width; then by name."""
    return sorted(tensors, key=lambda t: (-bits_type(t.dtype).itemsize, t.name))


def write_shards(
    tensors: Iterable[TensorInfo], bits: Callable[[str], NDArray[Any]], folder: Path
) -> tuple[FileEntry, ...]:
    """Write all tensors of a version, one in memory at a time.

    Args:
        tensors: what there is to write, in any order.
        bits: gives a tensor's elements by its name, of `bits_type`, in any shape.
        folder: takes the files.

    Returns:
        What the manifest says of the files.

    Raises:
        WeightsError: the folder cannot be written.
    """
    with ShardWriter(tensors, folder) as writer:
        for tensor in writer.order:
            writer.write(bits(tensor.name))
    return tuple(writer.files)


class ShardWriter:
    """Writes canonical shards a tensor at a time, in the order that it says; used in a `with` block.

    Args:
        tensors: all that will be written.
        folder: takes the files, `weights-00000-1f2e3d4c.safetensors` and so on.
        hashed: without it they are `weights-00000.safetensors` and so on, and no manifest can name them.
    """

    def __init__(self, tensors: Iterable[TensorInfo], folder: Path, *, hashed: bool = True) -> None:
        self.order = canonical_order(tensors)
        """In which `write` is called."""
        self.files: list[FileEntry] = []
        """What a manifest says of the files, once the block has ended; nothing where they are not hashed."""
        self.paths: list[Path] = []
        """Where they lie, once the block has ended."""
        self._folder, self._hashed = folder, hashed
        self._steps = _steps(self.order)
        self._file: ContentFile | None = None
        self._stack = ExitStack()

    def write(self, bits: NDArray[Any]) -> None:
        """Write the next tensor.

        Args:
            bits: its elements, of `bits_type`, in any shape.

        Raises:
            WeightsError: the disk is full, say.
        """
        tensor, group = next(self._steps)
        assert bits.dtype == bits_type(tensor.dtype), tensor.name
        assert bits.size == tensor.elements, tensor.name
        if group:
            self._end_file()
            stem = f"weights-{len(self.paths):05d}"
            file = ContentFile(self._folder, stem, ".safetensors", hashed=self._hashed)
            self._file = self._stack.enter_context(file)
            self._file.write(header(group))
        assert self._file is not None
        self._file.write(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)

    def _end_file(self) -> None:
        if self._file is not None:
            self._stack.close()
            assert self._file.path is not None
            self.paths.append(self._file.path)
            if self._file.entry is not None:
                self.files.append(self._file.entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        assert next(self._steps, None) is None, "a tensor is missing"
        self._end_file()


def _steps(tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, list[TensorInfo]]]:
    """Each tensor; with the first of each file all tensors of the file."""
    start = 0
    while start < len(tensors):
        end, size = start, 0
        while end < len(tensors) and (end == start or size + tensors[end].nbytes <= SHARD_BYTES):
            size += tensors[end].nbytes
            end += 1
        group = list(tensors[start:end])
        yield group[0], group
        yield from ((tensor, []) for tensor in group[1:])
        start = end
