"""`spoke-server grade --reward NAME FILE.jsonl`: rewards of responses in a file, as the server would give them.

Lines in, the same lines out with `reward` and `reward_error`, in order and as soon as they are known. The
server's own worker processes grade them, under its limits. Nothing is lost for a bad line, and memory is bounded:
only so many lines are under way.
"""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from server.grade_lines import Line, groups, read_lines
from shared.errors import ConfigError, RequestError, SpokeError

if TYPE_CHECKING:
    from server.rewards.pool import RewardPool

UNDER_WAY = 32
"""Most groups that are read but not written."""


@dataclass(slots=True)
class Tally:
    """What the summary says."""

    graded: int = 0
    unreadable: int = 0
    failed: int = 0
    """Graded lines with a `reward_error`."""
    total: float = 0.0

    def add(self, line: Line) -> None:
        """Count one line."""
        self.graded += line.readable
        self.unreadable += not line.readable
        self.failed += line.readable and line.error is not None
        self.total += line.reward

    def __str__(self) -> str:
        mean = f", mean reward {self.total / self.graded:.4g}" if self.graded else ""
        failed = f", {self.failed} with a reward_error" if self.failed else ""
        unreadable = f"; {self.unreadable} could not be graded" if self.unreadable else ""
        return f"{self.graded} lines graded{mean}{failed}{unreadable}"


def parser() -> argparse.ArgumentParser:
    """The command line of `grade`."""
    parse = argparse.ArgumentParser(
        prog="spoke-server grade",
        description='Grade the lines {"response": …, "reference": …} of a file ("options" if need be). Each comes '
        "back with reward and reward_error. Exit code 1: some lines could not be graded.",
    )
    add = parse.add_argument
    add("file", metavar="FILE.jsonl", help="- is standard input")
    add(
        "--reward",
        required=True,
        metavar="NAME[=MODULE:FUNCTION|URL]",
        help="a built-in reward, or one of your own",
    )
    add("--reward-workers", type=int, default=2, help="processes (%(default)s)")
    add("--reward-memory-gib", type=float, default=2.0, help="address space of each (%(default)s)")
    add("--reward-timeout", type=float, default=5.0, help="seconds a response (%(default)s)")
    add(
        "--reward-http-timeout",
        type=float,
        default=60.0,
        help="seconds a batch to a URL (%(default)s)",
    )
    return parse


def main(arguments: Sequence[str]) -> int:
    """Grade one file. Exit codes: 0 every line, 1 not all of them, 2 could not start, 130 interrupted."""
    args = parser().parse_args(arguments)
    try:
        with _source(args.file) as source, _lines_out() as stream:
            tally = asyncio.run(_run(args, source.fileno(), stream))
    except BrokenPipeError:  # whoever reads has seen enough
        return 1
    except SpokeError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    _say(str(tally))
    return 1 if tally.unreadable else 0


def _say(text: str) -> None:
    print(f"spoke-server grade: {text}", file=sys.stderr)


def _source(path: str) -> BinaryIO:
    try:
        return open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a JSONL file, or - for stdin") from None


@contextlib.contextmanager
def _lines_out() -> Iterator[BinaryIO]:
    """Standard output for the lines alone: what a reward function prints goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "wb", closefd=False) as stream:
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)


async def _run(args: argparse.Namespace, source: int, stream: BinaryIO) -> Tally:
    from server.rewards.limits import HttpLimits
    from server.rewards.pool import RewardPool

    if args.reward_http_timeout <= 0:
        raise ConfigError("--reward-http-timeout is above 0")
    if args.reward_workers < 1 or args.reward_timeout <= 0 or args.reward_memory_gib <= 0:
        raise ConfigError("--reward-workers, --reward-timeout and --reward-memory-gib are above 0")
    name, own, path = args.reward.partition("=")
    pool = RewardPool(
        {name: path} if own else {},
        workers=args.reward_workers,
        timeout_s=args.reward_timeout,
        memory_bytes=int(args.reward_memory_gib * 2**30),
        http=HttpLimits(timeout_s=args.reward_http_timeout),
    )
    try:
        await pool.start([name])
        return await grade_lines(pool, name, source, stream)
    except RequestError as error:
        raise ConfigError(f"--reward {name}: {error.detail}") from None
    finally:
        await pool.close()


async def grade_lines(pool: "RewardPool", name: str, source: int, stream: BinaryIO) -> Tally:
    """Grade every line of a file.

    Args:
        pool: where `name` is started.
        name: of the reward.
        source: file descriptor to read.
        stream: takes the lines, each as soon as it and those before it are graded.

    Raises:
        ConfigError: the function's processes cannot be started any more.
        BrokenPipeError: nobody reads the lines.
    """
    tally = Tally()
    queue: asyncio.Queue[asyncio.Task[list[Line]] | None] = asyncio.Queue(UNDER_WAY)

    async def read() -> None:
        async for lines in read_lines(source):
            for group in groups(lines):
                await queue.put(tasks.create_task(_grade(pool, name, group)))
        await queue.put(None)

    async def write() -> None:
        while (graded := await queue.get()) is not None:
            for line in await graded:
                tally.add(line)
                if line.fields is None:
                    _say(line.error or "")
                else:
                    line.write(stream)
            stream.flush()

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            tasks.create_task(write())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return tally


async def _grade(pool: "RewardPool", name: str, group: list[Line]) -> list[Line]:
    first = group[0].fields
    if first is None or not group[0].readable:
        return group
    responses = [line.fields["response"] for line in group if line.fields is not None]
    try:
        grades = await pool.grade(name, responses, first["reference"], first.get("options") or {})
    except RequestError as error:  # the reference or the options can grade no response
        for line in group:
            line.error = str(error)
        return group
    for line, grade in zip(group, grades, strict=True):
        line.reward, line.error = grade.reward, grade.error
    return group
