"""One worker process, seen from the server: started, asked, killed with all that it started.

Each has a socket and a process group of its own, so that nothing it does to either reaches another one.
"""

import asyncio
import contextlib
import json
import math
import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from server.rewards import worker
from server.rewards.base import Grade, brief, failed
from server.rewards.limits import Limits
from shared.errors import ConfigError, RequestError

START_LIMIT_S = 120.0
"""How long loading a function may take, in seconds: sympy takes three on a free core, far more on a busy one."""

GRACE_S = 0.5
"""How long after its alarm a leaf may go on before its process is killed, in seconds."""

MOST_BYTES = 1 << 20
"""Far more than a worker says of one batch."""

# -P: no file in the working directory may pose as json; the server's own path comes with the arguments.
_BOOT = (
    "import json, sys; arguments, sys.path[:] = json.loads(sys.argv.pop()); "
    "from server.rewards.worker import main; main(*arguments)"
)

SECRETS = ("SPOKE_TOKEN", "SPOKE_REDIS_URL", "SPOKE_REWARD_TOKEN")
"""How the names of variables begin that hold the server's own secrets: reward processes do not inherit them.

That keeps them out of dumps and of what a function starts. It hides them from no function that looks for them: a
process may read those of the same user (`/proc/PID/environ`).
"""

GARBLED = "its process wrote where only its worker may"


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(SECRETS)}


class GoneError(Exception):
    """The process ended before it took up a batch: no leaf's doing."""


@dataclass(slots=True)
class Process:
    """A process that holds one reward function."""

    limits: Limits
    _child: asyncio.subprocess.Process
    _socket: socket.socket
    """Questions go out; a byte comes back when a turn is over."""
    _lines: socket.socket
    """What became of each leaf, kept by the kernel until it is wanted: waking up for each would cost too much."""
    alive: bool = True
    """May be asked again."""
    _asked: bool = False
    """Its words are waited for, though it may be gone already."""
    _watch: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self._watch = asyncio.create_task(self._bury())

    @classmethod
    async def start(cls, target: str, limits: Limits) -> Self:
        """Start a process and wait until it has loaded the function.

        Raises:
            ConfigError: it cannot.
        """
        with contextlib.ExitStack() as ends:
            try:
                ours, theirs = map(ends.enter_context, socket.socketpair())
                lines, says = map(ends.enter_context, socket.socketpair())
                descriptors = theirs.fileno(), says.fileno()
                arguments = [*descriptors, target, limits.memory_bytes]
                child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-c", _BOOT, json.dumps([arguments, sys.path])),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=descriptors,
                    start_new_session=True,
                    env=_without_secrets(os.environ),
                )
            except (OSError, RuntimeError) as error:  # no memory, files, threads or processes left
                raise ConfigError(_unusable(target, f"no process: {error}")) from error
            theirs.close()
            says.close()
            ours.setblocking(False)
            lines.setblocking(False)
            ends.pop_all()
        process = cls(limits, child, ours, lines)
        why = await process._loaded()
        if why is not None:
            await process.end()
            raise ConfigError(_unusable(target, why))
        return process

    async def _loaded(self) -> str | None:
        """Why the process has no function, once it is known; None where it has one."""
        self._asked = True
        try:
            if not await self._over(START_LIMIT_S):
                return "its process dies while loading it"
            (line,) = self._said()
        except TimeoutError:
            return f"loading it takes longer than {START_LIMIT_S:g} s"
        except (_GarbledError, ValueError):
            return GARBLED
        except BaseException:  # cancelled: nobody else knows of this process
            self.kill()
            raise
        finally:
            self._asked = False
            self._hang_up()
        return None if "loaded" in line else str(line.get("failed"))

    async def grade(
        self, responses: tuple[str, ...], reference: str, options: dict[str, Any]
    ) -> list[Grade]:
        """Grade the first leaves of a batch; `alive` says whether the process may be asked again.

        Returns:
            Their grades; the last may be of a leaf that cost the process. None at all: the first leaf is to be
            tried in a fresh process.

        Raises:
            RequestError: the function refuses the request.
            GoneError: the process was gone before.
        """
        limit = self.limits.timeout_s
        self._asked = True
        try:
            question = pickle.dumps((responses, reference, options, limit))
            try:
                over = await self._over(limit + worker.TURN_S + GRACE_S, question)
                why = None if over else await self._cause_of_death()
            except TimeoutError:
                why = worker.too_slow(limit)
            except _GarbledError:
                why = GARBLED
            return self._turn(len(responses), why)
        finally:
            self._asked = False
            self._hang_up()

    def _turn(self, count: int, why: str | None) -> list[Grade]:
        """Grades of one turn, from what the process said until it was over, or until it failed for `why`."""
        grades: list[Grade] = []
        begun = complete = False
        try:
            for line in self._said():
                if "refused" in line:
                    raise _refusal(line)
                if "reward" in line or "error" in line:
                    grades.append(_grade(line))
                begun = begun or "begun" in line
                complete = len(grades) == count or "turn" in line
                if "last" in line or "again" in line:
                    complete = True
                    self.kill()
        except _GarbledError:
            why, complete = GARBLED, False
        if not complete:
            self.kill()
            if not begun:
                raise GoneError(why)
            grades.append(failed(why or GARBLED))
        return grades

    async def _over(self, limit_s: float, question: bytes = b"") -> bool:
        """Ask, and wait until the process says that it is done; False if it hangs up instead.

        Raises:
            TimeoutError: it does neither.
            _GarbledError: it says something else.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                if question:  # nothing at all would fail too where the process is gone
                    await loop.sock_sendall(self._socket, question)
                answer = await loop.sock_recv(self._socket, 64)
        except TimeoutError:  # an OSError too
            raise
        except OSError:
            return False
        if answer not in (b"", worker.OVER):
            raise _GarbledError
        return answer == worker.OVER

    def _said(self) -> Iterator[worker.Line]:
        """The lines that the process has written since the last call."""
        said = b""
        with contextlib.suppress(OSError):  # no more for now
            while (more := self._lines.recv(MOST_BYTES)) and len(said) < MOST_BYTES:
                said += more
        for raw in said.splitlines(keepends=True):
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise _GarbledError from error
            if not (isinstance(line, dict) and raw.endswith(b"\n")):
                raise _GarbledError
            yield line

    async def _cause_of_death(self) -> str:
        """How the process ended; one that closed its socket may need a moment more."""
        try:
            async with asyncio.timeout(GRACE_S):
                code = await self._child.wait()
        except TimeoutError:
            return "its process closed files that it did not open"
        return f"its process died ({cause_of_death(code)})"

    def kill(self) -> None:
        """Kill the process and all that it started."""
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill, and wait until it is gone."""
        self.kill()
        await asyncio.shield(self._watch)

    async def _bury(self) -> None:
        """What is left to do whenever the process ends."""
        await self._child.wait()
        self.kill()  # those that it started
        # One of them, in a session of its own, may hold the other end for ever. What was sent can still be read.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._hang_up()

    def _hang_up(self) -> None:
        if not (self._asked or self.alive):
            self._socket.close()
            self._lines.close()


class _GarbledError(Exception):
    """The process sent what no worker sends."""


def _grade(line: worker.Line) -> Grade:
    if "error" in line:
        return failed(str(line["error"]))
    reward = line["reward"]
    if not isinstance(reward, float) or not math.isfinite(reward):
        raise _GarbledError
    return Grade(reward=reward)


def _refusal(line: worker.Line) -> RequestError:
    match line["refused"]:
        case [str(name), str(detail)]:
            return RequestError(name, detail)
    raise _GarbledError


def _unusable(target: str, why: str) -> str:
    return f"reward function {target} cannot be used: {brief(why)}"


def cause_of_death(exitcode: int) -> str:
    """What a negative or positive exit code says.

    >>> cause_of_death(-9), cause_of_death(3)
    ('SIGKILL', 'exit code 3')
    """
    if exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"
