"""A file that is named after its content, once that is known: two writers never overwrite each other's bytes."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import WeightsError
from shared.manifest import FileEntry
from shared.receiving import FULL


def unwritable(folder: Path, error: OSError) -> WeightsError:
    """What to raise where a folder takes no file, with the remedy where its disk is full."""
    remedy = "; free some room there" if error.errno in FULL else ""
    return WeightsError(f"{folder}: {error}{remedy}")


class ContentFile:
    """A new file of a folder, `{stem}-{first 8 digits of its SHA-256}{suffix}`, hashed while it is written.

    Used in a `with` block: at its end the file takes its name, and `entry` describes it. After an exception
    nothing is left of it.

    Args:
        folder: where it goes; made where it is missing.
        stem: how its name begins.
        suffix: how its name ends.
        hashed: without it the file is `{stem}{suffix}` and there is no entry: nobody else will ever see it.

    Raises:
        WeightsError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, stem: str, suffix: str, *, hashed: bool = True) -> None:
        self.path: Path | None = None
        """Where it lies; None until the block ended."""
        self.entry: FileEntry | None = None
        """What a manifest says of it; None until the block ended."""
        self.size = 0
        """Bytes so far."""
        self._folder, self._stem, self._suffix = folder, stem, suffix
        self._hash = hashlib.sha256() if hashed else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, self._partial = tempfile.mkstemp(dir=folder, prefix=".", suffix=".partial")
        except OSError as error:
            raise unwritable(folder, error) from error
        self._stream = os.fdopen(descriptor, "wb")

    def write(self, data: bytes | memoryview) -> None:
        """Append some bytes."""
        try:
            self._stream.write(data)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        if self._hash is not None:
            self._hash.update(data)
        self.size += memoryview(data).nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stream.close()
            if kind is None:
                digest = "" if self._hash is None else self._hash.hexdigest()
                name = self._stem + (f"-{digest[:8]}" if digest else "") + self._suffix
                # mkstemp's files are for their owner alone; a store's are read by whoever may read the folder.
                Path(self._partial).chmod(0o644)
                self.path = Path(self._partial).rename(self._folder / name)
                if digest:
                    self.entry = FileEntry(name=name, size=self.size, sha256=digest)
        except OSError as failure:
            raise unwritable(self._folder, failure) from failure
        finally:
            if self.path is None:
                with contextlib.suppress(OSError):
                    Path(self._partial).unlink(missing_ok=True)
