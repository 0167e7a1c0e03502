"""Seeded arithmetic stories with a short chain of thought, in GSM8K's format.

A story starts from a count and changes it by 3 to 6 operations; every count stays in 1..60. A row
is ``{"question": story, "answer": chain}``; the chain has one unspaced equation for each operation
and ends with ``#### N``::

    Mia has 12 shells. She finds 8 more. ... How many shells does Mia have now?
    Mia starts with 12. Adding 8 makes 12+8=20. Half leaves 20/2=10. ... #### 10

Which split a story belongs to is a hash of its text, so the splits are disjoint whatever the seeds.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TypedDict
from urllib.parse import parse_qsl, urlsplit

MAX_VALUE = 60
"""The largest count in a story; 1 is the smallest."""
SCHEME = "problems"
"""The data name ``problems:SPLIT?seed=S&count=N`` stands for ``rows(SPLIT, S, N)``."""
_HELDOUT_EVERY = 8
_MIN_STEPS, _MAX_STEPS = 3, 6

_PEOPLE = (
    ("Mia", "She"), ("Tom", "He"), ("Ana", "She"), ("Ben", "He"), ("Lily", "She"), ("Sam", "He"),
)  # fmt: skip
_OBJECTS = ("apples", "shells", "coins", "books", "cards", "stones")


class Split(StrEnum):
    """The two halves of the space of stories."""

    TRAIN = "train"
    HELDOUT = "heldout"


DEFAULT_COUNT = {Split.TRAIN: 20_000, Split.HELDOUT: 600}


class Row(TypedDict):
    """One problem, in the common format of all data sets here."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of operation: its sign in equations, its operands, and how it is told.

    ``phrases`` are (in the story, in the chain of thought); {n} operand, {o} objects, {f} a friend,
    {p} "her" or "his".
    """

    sign: str
    operands: tuple[int, ...]
    phrases: tuple[tuple[str, str], ...]


_SMALL = tuple(range(2, 20))
_KINDS = (
    _Kind(
        sign="+",
        operands=_SMALL,
        phrases=(
            ("finds {n} more", "Adding {n} makes"),
            ("buys {n} more", "Adding {n} makes"),
            ("gets {n} from {f}", "Adding {n} makes"),
        ),
    ),
    _Kind(
        sign="-",
        operands=_SMALL,
        phrases=(
            ("gives {n} to {f}", "Taking {n} leaves"),
            ("loses {n}", "Taking {n} leaves"),
            ("sells {n} of them", "Taking {n} leaves"),
        ),
    ),
    _Kind(
        sign="*",
        operands=(2,),
        phrases=(
            ("doubles {p} {o}", "Doubling makes"),
            ("buys as many again", "Doubling makes"),
        ),
    ),
    _Kind(
        sign="/",
        operands=(2,),
        phrases=(
            ("gives half to {f}", "Half leaves"),
            ("loses half of them", "Half leaves"),
        ),
    ),
    _Kind(sign="*", operands=(3,), phrases=(("triples {p} {o}", "Tripling makes"),)),
    _Kind(
        sign="/",
        operands=(3, 4, 5),
        phrases=(("shares them in {n} bags and keeps one", "One of {n} bags is"),),
    ),
)
_WEIGHTS = (4, 4, 3, 3, 1, 1)


def _apply(value: int, sign: str, operand: int) -> int | None:
    """Return ``value sign operand``, or None where that is not a count from 1 to MAX_VALUE."""
    if sign == "/":
        result = value // operand if value % operand == 0 else 0
    else:
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
    return result if 1 <= result <= MAX_VALUE else None


def _chain(name: str, start: int, steps: list[tuple[_Kind, int, str]]) -> str:
    """Write the chain of thought. steps: (kind, operand, phrase) of each operation."""
    value, lines = start, [f"{name} starts with {start}."]
    for kind, operand, phrase in steps:
        result = _apply(value, kind.sign, operand)
        assert result is not None
        lines.append(f"{phrase} {value}{kind.sign}{operand}={result}.")
        value = result
    return " ".join(lines) + f"\n#### {value}"


def _operation(rng: random.Random, value: int) -> tuple[_Kind, int, int]:
    """Draw (kind, operand, result) of an operation that keeps the count in range."""
    while True:
        (kind,) = rng.choices(_KINDS, _WEIGHTS)
        operand = rng.choice(kind.operands)
        result = _apply(value, kind.sign, operand)
        if result is not None:
            return kind, operand, result


def _story(rng: random.Random) -> Row:
    """Draw one problem."""
    (name, pronoun), (friend, _) = rng.sample(_PEOPLE, 2)
    objects, start = rng.choice(_OBJECTS), rng.randint(4, 40)
    possessive = "her" if pronoun == "She" else "his"
    sentences = [f"{name} has {start} {objects}."]
    steps, value = list[tuple[_Kind, int, str]](), start
    for _ in range(rng.randint(_MIN_STEPS, _MAX_STEPS)):
        kind, operand, value = _operation(rng, value)
        told, thought = rng.choice(kind.phrases)
        told = told.format(n=operand, o=objects, f=friend, p=possessive)
        sentences.append(f"{pronoun} {told}.")
        steps.append((kind, operand, thought.format(n=operand)))
    sentences.append(f"How many {objects} does {name} have now?")
    return {"question": " ".join(sentences), "answer": _chain(name, start, steps)}


def stories(split: Split, seed: int) -> Iterator[Row]:
    """Yield endless distinct problems of one split."""
    rng = random.Random(f"{split}:{seed}")
    seen = set[str]()
    while True:
        row = _story(rng)
        if row["question"] not in seen and split_of(row["question"]) is split:
            seen.add(row["question"])
            yield row


def split_of(question: str) -> Split:
    """Return the split that a question belongs to: one in eight is held out, by its hash."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return Split.TRAIN if int.from_bytes(digest) % _HELDOUT_EVERY else Split.HELDOUT


def rows(split: Split, seed: int, count: int) -> list[Row]:
    """Return the first ``count`` problems of ``stories``."""
    return list(islice(stories(split, seed), count))


def load(name: str) -> list[Row]:
    """Return the problems of a data name such as ``problems:train?seed=1&count=500``.

    Raises ValueError for a name of another form. Without them, seed is 0 and count DEFAULT_COUNT.
    """
    url = urlsplit(name)
    query = dict(parse_qsl(url.query))
    known = url.scheme == SCHEME and url.path in list(Split) and not set(query) - {"seed", "count"}
    if not known or not all(value.isdecimal() for value in query.values()):
        raise ValueError(f"{name!r} is not of the form problems:train|heldout?seed=S&count=N")
    split = Split(url.path)
    return rows(split, int(query.get("seed", 0)), int(query.get("count", DEFAULT_COUNT[split])))
