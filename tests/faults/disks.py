"""A small disk that can be filled up: a tmpfs, or where none may be mounted, a limit on one process's files."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Disk:
    """One that is full when told to be.

    Args:
        folder: on it.
        mounted: it is a file system of its own; else files of `process` cannot grow while it is "full".
    """

    def __init__(self, folder: Path, *, mounted: bool) -> None:
        self.folder = folder
        self.mounted = mounted
        self._ballast = folder / "ballast"

    def fill(self, process: Any) -> None:
        """No room from now on, for any process; without a file system of its own for this one alone."""
        if not self.mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with self._ballast.open("ab", buffering=0) as ballast:
            for piece in (1 << 16, 1):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(piece)):
                        pass

    def free(self, process: Any) -> None:
        """There is room again."""
        if not self.mounted:
            limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
            return
        self._ballast.unlink()


@contextlib.contextmanager
def disk(folder: Path, *, megabytes: int) -> Iterator[Disk]:
    """A disk of a size, gone when the block ends."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield Disk(folder, mounted=mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
