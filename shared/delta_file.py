"""The files of a delta version: what changed in each tensor, one blob of `shared.delta` after another.

A file is the blobs, then a table of them, `[[name, length], …]` in JSON and in one zstd frame, then eight bytes:
the frame's length (u32, little endian) and `SpDF`. The table stands last because it is known last: writing holds
one blob at a time, and reading maps the file and looks at one. A tensor that did not change is in no file.
"""

import json
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard

from shared.content_file import ContentFile
from shared.errors import WeightsError
from shared.manifest import FileEntry
from shared.shards import SHARD_BYTES

_TAIL = struct.Struct("<I4s")
_MAGIC = b"SpDF"
_MOST_TABLE = 1 << 26
"""Bytes of a table, of half a million tensors or more."""


def write_delta(
    blobs: Iterable[tuple[str, bytes]], folder: Path, *, file_bytes: int = SHARD_BYTES
) -> tuple[FileEntry, ...]:
    """Write the blobs of a delta version, one in memory at a time.

    Args:
        blobs: name and blob of each tensor that changed, no name twice.
        folder: takes the files.
        file_bytes: a file ends before the blob that would make it larger; at least one blob goes into each.

    Returns:
        What the manifest says of the files; none where nothing changed.

    Raises:
        WeightsError: the folder cannot be written.
    """
    files: list[FileEntry] = []
    rest = iter(blobs)
    first = next(rest, None)
    while first is not None:
        table: list[tuple[str, int]] = []
        with ContentFile(folder, f"delta-{len(files):05d}", ".spd") as file:
            blob: tuple[str, bytes] | None = first
            while blob is not None and (not table or file.size + len(blob[1]) <= file_bytes):
                file.write(blob[1])
                table.append((blob[0], len(blob[1])))
                blob = next(rest, None)
            frame = zstandard.ZstdCompressor(level=9).compress(json.dumps(table).encode())
            file.write(frame)
            file.write(_TAIL.pack(len(frame), _MAGIC))
        assert file.entry is not None
        files.append(file.entry)
        first = blob
    return tuple(files)


class DeltaFiles:
    """The files of one delta version, mapped for reading; used in a `with` block.

    Args:
        paths: all files of the version.

    Raises:
        WeightsError: a file is missing or damaged, or a tensor is in them twice.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[mmap.mmap, int, int]] = {}
        for path in paths:
            self._read_table(path)

    def _read_table(self, path: Path) -> None:
        try:
            with path.open("rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            length, magic = _TAIL.unpack_from(data, max(len(data) - _TAIL.size, 0))
            end = len(data) - _TAIL.size - length
            if magic != _MAGIC or end < 0:
                raise ValueError("its end is missing")
            table = zstandard.ZstdDecompressor().decompress(
                _bounded(data[end : end + length]), allow_extra_data=False
            )
            at = 0
            for name, size in json.loads(table):
                if not isinstance(name, str) or not isinstance(size, int):
                    raise ValueError("its table is none")
                if name in self._places or not 0 <= size <= end - at:
                    raise ValueError(f"its entry {name!r} is impossible")
                self._places[name] = (data, at, size)
                at += size
            if at != end:
                raise ValueError("its table does not cover it")
        except (OSError, ValueError, TypeError, struct.error, zstandard.ZstdError) as error:
            raise WeightsError(f"{path.name} is not a whole delta file: {error}") from None

    @property
    def names(self) -> frozenset[str]:
        """Tensors that changed."""
        return frozenset(self._places)

    def blob(self, name: str) -> bytes | None:
        """What changed in a tensor; None where nothing did."""
        place = self._places.get(name)
        if place is None:
            return None
        data, at, size = place
        return data[at : at + size]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._places.clear()


def _bounded(frame: bytes) -> bytes:
    """The frame, if its content is no larger than a table can be."""
    size = zstandard.frame_content_size(frame)
    if not 0 <= size <= _MOST_TABLE:
        raise ValueError(f"its table claims {size} bytes")
    return frame
