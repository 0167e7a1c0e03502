"""The lines of a file that `spoke-server grade` grades: read as they come, checked, grouped, written."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 16
"""Most bytes of one read."""
TOGETHER = 32
"""Most lines of one group: neighbours that share reference and options, graded by one call."""


@dataclass(slots=True, kw_only=True)
class Line:
    """One line of the file, and what becomes of it."""

    number: int
    """From 1."""
    fields: dict[str, Any] | None = None
    """None where it is no JSON object: such a line is named on standard error, and not written."""
    readable: bool = True
    """Has what grading needs."""
    reward: float = 0.0
    error: str | None = None

    def write(self, stream: BinaryIO) -> None:
        """The line with its reward."""
        result = (self.fields or {}) | {"reward": self.reward, "reward_error": self.error}
        try:
            stream.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
            stream.write(json.dumps(result).encode() + b"\n")


def groups(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Neighbours that one call can grade; lines that cannot be graded by themselves."""
    for _, alike in groupby(lines, key=_key):
        group = list(alike)
        for start in range(0, len(group), TOGETHER):
            yield group[start : start + TOGETHER]


def _key(line: Line) -> tuple[bool, str, str]:
    if line.fields is None or not line.readable:
        return False, "", ""
    options = json.dumps(line.fields.get("options"), sort_keys=True)
    return True, line.fields["reference"], options


async def read_lines(source: int) -> AsyncIterator[list[Line]]:
    """The lines of each read; empty ones are passed over.

    Args:
        source: file descriptor.
    """
    number = 0
    parts: list[bytes] = []
    ended = False
    while not ended:
        chunk = await _read(source)
        ended = not chunk
        head, *more = chunk.split(b"\n")
        parts.append(head)
        if not (more or ended):
            continue
        raw = [b"".join(parts), *more]
        parts = [] if ended else [raw.pop()]
        numbered = list(enumerate(raw, number + 1))
        number += len(raw)
        yield [parse_line(place, text) for place, text in numbered if text.strip()]


async def _read(source: int) -> bytes:
    """What there is to read, awaited without a thread: a blocked one would outlive an interrupt."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(source, ready.set)
    except PermissionError:  # epoll's word for a regular file, which is always ready
        return os.read(source, CHUNK_BYTES)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(source)
    return os.read(source, CHUNK_BYTES)


def parse_line(number: int, raw: bytes) -> Line:
    """One line of the file; whatever is wrong with it is in `error`.

    >>> parse_line(3, b'{"response": "72", "id": 5}').error
    "line 3: no field 'reference'"
    """
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Line(number=number, readable=False, error=f"line {number}: not UTF-8")
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}"
        return Line(number=number, readable=False, error=f"line {number}: not JSON: {why}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return Line(number=number, readable=False, error=f"line {number}: not JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number=number, readable=False, error=f"line {number}: not a JSON object")
    problem = _problem(fields)
    if problem is None:
        return Line(number=number, fields=fields)
    return Line(number=number, fields=fields, readable=False, error=f"line {number}: {problem}")


def _problem(fields: dict[str, Any]) -> str | None:
    for name in ("response", "reference"):
        if name not in fields:
            return f"no field {name!r}"
        if not isinstance(fields[name], str):
            return f"field {name!r} is {json.dumps(fields[name])[:40]}, not a string"
    options = fields.get("options")
    if options is not None and not isinstance(options, dict):
        return f"field 'options' is {json.dumps(options)[:40]}, not an object"
    return None
