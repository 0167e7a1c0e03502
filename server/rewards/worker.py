"""What runs inside a worker process: one reward function, leaf by leaf, under a time limit.

Questions come in as pickles of our own server; what goes out is a line of JSON for each leaf the moment it is
graded: a process that dies has said all that it knew, so the next leaf is the one it died of, and whatever a
function writes there is never unpickled.

The limit is an alarm that raises in the function, which costs nothing and keeps the process. Code that an alarm
cannot stop (C code that never returns, `except BaseException`) is killed with its process by the server.
"""

import contextlib
import ctypes
import importlib
import json
import math
import os
import pickle
import resource
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, SupportsFloat

from server.rewards.base import RewardFunction, brief
from shared.errors import RequestError

TURN_S = 0.25
"""Seconds after which a batch goes back with what is done, so that trees take turns."""

OVER = b"."

LEFT_BEHIND = "left processes running; it has to wait for those that it starts"

Line = dict[str, Any]
"""One line to the server; `server.rewards.process` reads it.

{"loaded": true} or {"failed": why}        once, after the start
{"begun": true}                            the batch is here: what happens from now on is a leaf's doing
{"reward": 1.0} or {"error": why}          a leaf; with "last": true the process ends itself after it
{"again": true}                            the leaf is to be tried in a fresh process; this one ends itself
{"refused": [field, detail]}               the function's RequestError
{"turn": true}                             the rest of the batch is for the next turn
"""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _TimeUpError(BaseException):
    """The alarm; not an Exception, so that `except Exception` in a reward function does not swallow it."""


def main(asked: int, says: int, target: str, memory_bytes: int | None) -> None:
    """Load a function and grade until the server goes away.

    Args:
        asked: descriptor of a connected stream socket: questions in, OVER out at the end of each turn.
        says: descriptor of another one: lines out.
        target: dotted path `package.module:function`.
        memory_bytes: bound on the address space; None for none.
    """
    with contextlib.suppress(OSError, AttributeError):  # Linux alone can: die with the server
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no gigabytes
    signal.signal(signal.SIGALRM, _ring)
    channel = _Channel(socket.socket(fileno=asked), socket.socket(fileno=says))
    try:
        worker = _Worker(_load(target), channel, memory_bytes)
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    except BaseException as error:  # a user's module may raise anything; the server says so at once
        channel.say({"failed": _describe(error)})
        channel.over()
        return
    channel.say({"loaded": True})
    channel.over()
    with channel.asked.makefile("rb") as questions, contextlib.suppress(EOFError, OSError):
        while True:
            worker.grade_batch(*pickle.load(questions))
            channel.over()


@dataclass(frozen=True, slots=True)
class _Channel:
    asked: socket.socket
    says: socket.socket

    def __post_init__(self) -> None:
        self.asked.set_inheritable(False)
        self.says.set_inheritable(False)

    def say(self, line: Line) -> None:
        """What became of one leaf: in the kernel's hands before the next one can do harm."""
        self._send(self.says, json.dumps(line).encode() + b"\n")

    def over(self) -> None:
        self._send(self.asked, OVER)

    def _send(self, to: socket.socket, data: bytes) -> None:
        try:
            to.sendall(data)
        except OSError:  # the server is gone, or the function closed what is not its own
            os._exit(1)


def _load(target: str) -> RewardFunction:
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not callable(found):
        raise TypeError(f"it is a {type(found).__name__}, not a function")
    function: RewardFunction = found
    return function


@dataclass(slots=True)
class _Worker:
    function: RewardFunction
    channel: _Channel
    memory_bytes: int | None
    graded: int = 0
    """Leaves of this process so far."""
    pid: int = 0
    helpers: bool = False
    """Processes that the module started when it was loaded may stay, and those of its leaves with them."""
    loaded_bytes: int = 0

    def __post_init__(self) -> None:
        self.pid = os.getpid()
        self.helpers = _has_children()
        self.loaded_bytes = _address_space()

    def grade_batch(
        self,
        responses: Sequence[str],
        reference: str,
        options: Mapping[str, Any],
        timeout_s: float,
    ) -> None:
        """Grade leaves in order until the turn is over: at least one, often all."""
        self.channel.say({"begun": True})
        end_of_turn = time.monotonic() + TURN_S
        for position, response in enumerate(responses, 1):
            line = self._limited(response, reference, options, timeout_s)
            if os.getpid() != self.pid:  # a fork of the function's, which came back with it
                os._exit(0)
            if not self.helpers and _has_children():
                line = {"error": LEFT_BEHIND} if "reward" in line else line
                line["last"] = True
            if line.pop("memory", False) and self._is_crowded():
                # What earlier leaves left in memory is not this one's fault.
                line = {"again": True} if self.graded else line | {"last": True}
            self.graded += 1
            self.channel.say(line)
            if "last" in line or "again" in line:
                _end_with_all_below()
            if "refused" in line:
                return
            if time.monotonic() > end_of_turn and position < len(responses):
                self.channel.say({"turn": True})
                return

    def _is_crowded(self) -> bool:
        """Is more than half of the room gone that the function had when it was loaded?"""
        with contextlib.suppress(OSError, MemoryError):
            return self.memory_bytes is None or 2 * _address_space() > (
                self.memory_bytes + self.loaded_bytes
            )
        return True

    def _limited(
        self, response: str, reference: str, options: Mapping[str, Any], timeout_s: float
    ) -> Line:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, timeout_s)
                return self._call(response, reference, options)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TimeUpError:  # once at most, even between the function's return and the line above
            return {"error": too_slow(timeout_s)}

    def _call(self, response: str, reference: str, options: Mapping[str, Any]) -> Line:
        try:
            value: object = self.function(response, reference, options)
            reward = float(value) if isinstance(value, SupportsFloat) else None
        except _TimeUpError:
            raise
        except RequestError as error:
            return {"refused": [brief(error.field), brief(error.detail)]}
        except MemoryError as error:
            return {"error": _describe(error), "memory": True}
        except BaseException as error:  # SystemExit too costs its own leaf only
            return {"error": _describe(error)}
        if reward is None or not math.isfinite(reward):
            found = type(value).__name__ if reward is None else str(reward)
            return {"error": brief(f"returned {found}, not a finite number")}
        return {"reward": reward}


def _has_children() -> bool:
    """Does a process run that this one started? Those that ended are forgotten."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as pages:
        return int(pages.read().split()[0]) * resource.getpagesize()


def _end_with_all_below() -> NoReturn:
    os.killpg(0, signal.SIGKILL)  # the server made this process the leader of its group
    os._exit(1)


def too_slow(timeout_s: float) -> str:
    """The error of a leaf that ran into its limit."""
    return f"took longer than its limit of {timeout_s:g} s"


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise _TimeUpError


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return brief(f"{name}: {error}")
    except _TimeUpError:
        raise
    except BaseException:  # its own text may fail too
        return brief(name)
