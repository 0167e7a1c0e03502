"""Folders that a process needs while it lives. One that was killed leaves its own behind, and the next deletes it.

{root}/{prefix}XXXXXXXX/.lock    locked as long as its process lives
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = ".lock"
_BORN = ".new-"
"""Begins the name of a folder that is not locked yet."""


class Scratch:
    """A new folder, deleted when it is closed, or else by whoever makes the next one once this process is gone.

    Args:
        root: takes the folder; made where it is missing.
        prefix: how its name begins; others of this user that begin so, and whose process is gone, are deleted.

    Raises:
        OSError: no folder can be made there.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root, prefix)
        born = Path(tempfile.mkdtemp(prefix=_BORN + prefix, dir=root))
        self._lock = _locked(born / _LOCK, os.O_CREAT)
        # Under its name only once it is locked: nobody takes it for one that was left.
        self.folder = born.rename(root / born.name.removeprefix(_BORN))

    def close(self) -> None:
        """Delete the folder, as far as that can be done."""
        _delete(self.folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(path: Path, flags: int = 0) -> int | None:
    """The lock, ours while the descriptor is open; None where another process has it, or there are no locks."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(root: Path, prefix: str) -> None:
    """Delete what processes left that are gone."""
    for folder in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # somebody else deletes it
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = _locked(folder / _LOCK)
            if lock is not None:
                try:
                    _delete(folder)
                finally:
                    os.close(lock)


def _delete(folder: Path) -> None:
    """Its lock last: who is killed here leaves something that is found again."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
