"""A file of a version comes in: gone on with where it stopped, bounded, in its place once its bytes are right.

NAME.part while it comes, NAME when size and SHA-256 are those of its manifest
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from shared.digests import file_sha256
from shared.errors import LocalError, RoomError, WeightsError
from shared.manifest import FileEntry

PIECE = 1 << 20
"""Bytes that are read, hashed and written at once."""
WORKERS = 4
"""Most files of one version that come in at once."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where a disk, a quota or a limit is used up."""


class Opener(Protocol):
    """Opens the source of a file."""

    def __call__(
        self, entry: FileEntry, offset: int
    ) -> AbstractContextManager[tuple[int, Iterable[bytes]]]:
        """Where its bytes start, which is the offset or 0, and the bytes from there."""
        ...


class StoppedError(WeightsError):
    """Whoever wanted the file wants it no more."""


class Stop:
    """Ends one fetch: because its caller said so, or because one of its files failed.

    Args:
        outer: the caller's; never set here, since its caller may go on with another source.
    """

    def __init__(self, outer: threading.Event | None) -> None:
        self._own = threading.Event()
        self._outer = outer or self._own

    def set(self) -> None:
        """End this fetch."""
        self._own.set()

    def is_set(self) -> bool:
        """Is it to end?"""
        return self._own.is_set() or self._outer.is_set()

    def wait(self, pause_s: float) -> bool:
        """Pause, seconds, unless the caller ends it; is it to end?"""
        self._outer.wait(pause_s)
        return self.is_set()


def receive(entry: FileEntry, folder: Path, opened: Opener, stop: Stop | None = None) -> Path:
    """Bring one file into a folder.

    Args:
        entry: its name, size and SHA-256.
        folder: where it belongs; a `.part` of an earlier call is gone on with.
        opened: its source. What it raises passes through, and what has come stays for the next call.
        stop: given up soon after it is set.

    Raises:
        RoomError: the disk is full; nothing of the file is left.
        LocalError: another call still writes the file.
        WeightsError: the source has other bytes, too few or too many of them.
    """
    target = folder / entry.name
    if holds(target, entry):
        return target
    part = folder / f"{entry.name}.part"
    with _room(entry, part), _alone(part) as stream:
        resumed = _fill(entry, stream, opened, stop)
        if resumed and not _is_right(entry, stream):
            # What lay there may have been damaged, or of another source: this one gets its own chance.
            stream.truncate(0)
            _fill(entry, stream, opened, stop)
        if not _is_right(entry, stream):
            part.unlink(missing_ok=True)
            raise WeightsError("it has other bytes than its manifest says")
        stream.flush()
        part.replace(target)
    return target


def receive_all(
    files: Sequence[FileEntry], receive_one: Callable[[FileEntry], Path], stop: Stop
) -> tuple[Path, ...]:
    """Bring in files, a few at a time; after the first that fails no other is begun.

    In daemon threads: a source that hangs does not keep the process alive.

    Args:
        files: distinct names.
        receive_one: brings one in; minds `stop`.
        stop: set here when one of them fails.

    Raises:
        WeightsError: of the first one that failed.
    """
    left = iter(files)
    lock = threading.Lock()
    found: dict[str, Path] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            with lock:
                entry = next(left, None)
            if entry is None:
                return
            try:
                found[entry.name] = receive_one(entry)
            except BaseException as error:  # edge of the thread: it belongs to whoever asked
                errors.append(error)
                stop.set()

    threads = [
        threading.Thread(target=work, name="spoke-receive", daemon=True)
        for _ in range(min(WORKERS, len(files)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    if len(found) < len(files):
        raise StoppedError("given up: nobody waits for it any more")
    return tuple(found[entry.name] for entry in files)


def holds(path: Path, entry: FileEntry) -> bool:
    """Is there a file with the size and SHA-256 of an entry?"""
    try:
        return path.stat().st_size == entry.size and file_sha256(path) == entry.sha256
    except OSError:
        return False


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The open part, for one writer at a time: one that was given up may still be writing."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(f"{part.name} is being written already; try again") from None
        try:
            yield stream
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink(missing_ok=True)  # nothing came


@contextlib.contextmanager
def _room(entry: FileEntry, part: Path) -> Iterator[None]:
    """Tell a full disk from everything else; then the part goes, so that others find room."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        part.unlink(missing_ok=True)
        raise RoomError(
            f"no room for {entry.name} ({entry.size:,} bytes) in {part.parent}: {error.strerror}; "
            "free some, or choose another folder"
        ) from None


def _fill(entry: FileEntry, stream: BinaryIO, opened: Opener, stop: Stop | None) -> bool:
    """Write what is missing at the end of the part; True where something was there before."""
    at = stream.seek(0, os.SEEK_END)
    if at > entry.size:
        at = stream.truncate(0)
    if at == entry.size:
        return at > 0
    with opened(entry, at) as (start, pieces):
        if start != at:
            stream.truncate(start)
        at = start
        for piece in pieces:
            if stop is not None and stop.is_set():
                raise StoppedError(f"{entry.name}: given up: nobody waits for it any more")
            at += len(piece)
            if at > entry.size:
                stream.truncate(0)
                raise WeightsError(f"it has more than {entry.size} bytes")
            stream.write(piece)
        stream.flush()
    if at < entry.size:
        raise WeightsError(f"it ends after {at} bytes, not {entry.size}")
    return start > 0


def _is_right(entry: FileEntry, stream: BinaryIO) -> bool:
    stream.seek(0)
    digest = hashlib.sha256()
    while piece := stream.read(PIECE):
        digest.update(piece)
    return stream.tell() == entry.size and digest.hexdigest() == entry.sha256
