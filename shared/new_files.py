"""Files that come into a store whole, and never over another one.

| protocol | how |
|---|---|
| a folder | written beside its place, synced, linked into it: the system refuses where one is |
| s3, gs | put with the condition that none is there (`If-None-Match` on S3) |
| others | looked for before it is written; a small one is moved into its place |

The condition is a mode of fsspec's; in memory it looks and then writes, too.
"""

import contextlib
import errno
import os
import posixpath
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from fsspec.callbacks import Callback
from fsspec.spec import AbstractFileSystem

from shared.file_system import OBJECTS, protocols

LOCAL = frozenset({"file", "local"})
_NO_SUCH_CALL = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
CREATE = OBJECTS | {"memory"}
"""Protocols whose fsspec implementation knows the exclusive mode `create`."""
PART = 16 << 20
"""Bytes of a part of what is put into an object store, which takes 10,000 of one file."""


class NewFiles:
    """Makes files in a file system.

    Args:
        fs: the file system.
    """

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = fs
        known = protocols(fs)
        self._local, self._objects = bool(known & LOCAL), bool(known & OBJECTS)
        self._creates = bool(known & CREATE)

    def folder(self, path: str) -> None:
        """Make a folder, and those above it, where there are folders."""
        if not self._objects:  # there it would make the bucket
            self._fs.makedirs(path, exist_ok=True)

    def put(self, path: str, source: Path, moved: Callable[[], None], *, link: bool) -> None:
        """A local file's copy.

        Args:
            path: in the file system.
            source: on this machine.
            moved: called whenever a part has got there.
            link: on local files, no copy but the file itself.

        Raises:
            FileExistsError: there is one; elsewhere than on local files and with `create` it is written over.
        """
        if self._local and link:
            sync(str(source))
            os.link(source, path)
        elif self._local:
            with self._partial(path) as partial:
                self._fs.put_file(str(source), partial)
                sync(partial)
                os.link(partial, path)
        else:
            how: dict[str, object] = {"mode": "create"} if self._creates else {}
            if self._objects:
                how["chunksize"] = PART
            with self._refusal(path):
                self._fs.put_file(str(source), path, callback=_Moved(moved), **how)

    def create(self, path: str, data: bytes) -> None:
        """A small file that is there whole or not at all.

        Raises:
            FileExistsError: there is one.
        """
        if self._local:
            with self._partial(path) as partial:
                self._fs.pipe_file(partial, data)
                sync(partial)
                os.link(partial, path)
            sync(posixpath.dirname(path))
        elif self._creates:
            with self._refusal(path):
                self._fs.pipe_file(path, data, mode="create")
        else:
            with self._partial(path) as partial:
                self._fs.pipe_file(partial, data)
                if self._fs.exists(path):
                    raise FileExistsError(path)
                self._fs.mv(partial, path)

    @contextlib.contextmanager
    def _partial(self, path: str) -> Iterator[str]:
        """A name beside a path that nobody else writes to; gone at the end."""
        partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        try:
            yield partial
        finally:
            if self._fs.exists(partial):
                self._fs.rm_file(partial)

    @contextlib.contextmanager
    def _refusal(self, path: str) -> Iterator[None]:
        """A condition that failed as FileExistsError: not every S3 says which one it was."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EINVAL and self._fs.exists(path):
                raise FileExistsError(path) from error
            raise


class _Moved(Callback):  # type: ignore[misc]  # fsspec has no types
    """Passes on that bytes have got there."""

    def __init__(self, moved: Callable[[], None]) -> None:
        super().__init__()
        self._moved = moved

    def call(self, *args: object, **kwargs: object) -> None:
        """Called by fsspec after each part."""
        self._moved()


def sync(path: str) -> None:
    """Local files reach the disk before anyone hears of them; object stores are durable on return."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files and know nothing of folders.
        if error.errno not in _NO_SUCH_CALL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
