"""What the process that vLLM runs in does first, before vLLM's own code: the model is not loaded yet.

It ends with the server that started it, from here on. And where it was forked it lets go of that server's
connections: its copies would keep a port taken, and a connection open that the server has closed.
"""

import ctypes
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(server: int, engine: Callable[..., None], **arguments: object) -> None:
    """Call vLLM's own code in a process that is tied to its server.

    Args:
        server: process id of the server, whose child this is.
        engine: vLLM's own code.
        arguments: of that.
    """
    end_with(server)
    let_go()
    engine(**arguments)


def end_with(parent: int) -> None:
    """From now on this process is killed with its parent; it ends at once where the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def let_go() -> None:
    """Close this process's copies of all TCP and UDP sockets."""
    files = Path("/proc/self/fd")
    if not files.is_dir():
        return  # not Linux, where nothing is forked
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(file.name) for file in files.iterdir()]:
        if _is_internet(number):
            # Its number stays taken: the socket object, when it is collected, closes it once more.
            os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _is_internet(number: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
    except OSError:  # that of the listing itself, closed by now
        return False
    found = socket.socket(fileno=number)
    try:
        return found.family in (socket.AF_INET, socket.AF_INET6)
    finally:
        found.detach()
