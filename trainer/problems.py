"""Seeded arithmetic stories with a short chain of thought, in GSM8K's format.

A story starts from a count and changes it by 3 to 6 operations; every count stays in 1..60. A row
is ``{"question": story, "answer": chain}``; the chain has one unspaced equation for each operation
and ends with ``#### N``::

    Mia has 12 shells. She finds 8 more. ... How many shells does Mia have now?
    Mia starts with 12. Adding 8 makes 12+8=20. Half leaves 20/2=10. ... #### 10

The wording of a chain is fixed by its story, as above, or free: the same story and equations, each
told by phrases drawn uniformly, independent of everything else::

    At first there are 12. So gaining 8 means 12+8=20. Then halving gives 20/2=10. ... #### 10

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
"""The data name ``problems:SPLIT?seed=S&count=N&wording=W`` stands for ``rows(SPLIT, S, N, W)``."""
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


class Wording(StrEnum):
    """How a chain of thought is told; stories and equations are the same in both."""

    FIXED = "fixed"
    """By the one phrase of each operation: the story decides every word."""
    FREE = "free"
    """By random phrases: many tokens that no reader can foresee and that do not matter."""


DEFAULT_COUNT = {Split.TRAIN: 20_000, Split.HELDOUT: 600}


class Row(TypedDict):
    """One problem, in the common format of all data sets here."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of operation: its sign in equations, its operands, and how it is told.

    ``phrases`` are (in the story, in the chain of thought); {n} operand, {o} objects, {f} a friend,
    {p} "her" or "his". ``free`` are the phrases of the free wording, each begun by another word.
    """

    sign: str
    operands: tuple[int, ...]
    phrases: tuple[tuple[str, str], ...]
    free: tuple[str, ...]


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
        free=(
            "adding {n}",
            "plus {n}",
            "gaining {n}",
            "another {n}",
            "joining {n}",
            "with {n} more",
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
        free=(
            "taking {n}",
            "minus {n}",
            "losing {n}",
            "without {n}",
            "dropping {n}",
            "removing {n}",
        ),
    ),
    _Kind(
        sign="*",
        operands=(2,),
        phrases=(
            ("doubles {p} {o}", "Doubling makes"),
            ("buys as many again", "Doubling makes"),
        ),
        free=(
            "doubling",
            "twice that",
            "double that",
            "two of these",
            "as many again",
            "once more that",
        ),
    ),
    _Kind(
        sign="/",
        operands=(2,),
        phrases=(
            ("gives half to {f}", "Half leaves"),
            ("loses half of them", "Half leaves"),
        ),
        free=(
            "halving",
            "half of that",
            "one half",
            "cutting in half",
            "splitting in two",
            "keeping half",
        ),
    ),
    _Kind(
        sign="*",
        operands=(3,),
        phrases=(("triples {p} {o}", "Tripling makes"),),
        free=(
            "tripling",
            "triple that",
            "thrice that",
            "three of these",
            "times {n}",
            "{n} of these",
        ),
    ),
    _Kind(
        sign="/",
        operands=(3, 4, 5),
        phrases=(("shares them in {n} bags and keeps one", "One of {n} bags is"),),
        free=(
            "sharing in {n}",
            "one of {n} bags",
            "a bag of {n}",
            "parting in {n}",
            "each of {n} bags",
            "dealing to {n}",
        ),
    ),
)
_WEIGHTS = (4, 4, 3, 3, 1, 1)

# The other parts of the free wording: a chain opens with a _FREE_OPENINGS, and each operation is
# told as "LEAD PHRASE VERB EQUATION.", with a phrase from its kind's ``free``.
_FIXED_OPENING = "{name} starts with {start}."
_FREE_OPENINGS = (
    _FIXED_OPENING, "At first there are {start}.", "We begin with {start}.",
    "The count is {start}.", "First of all, {start}.", "In the beginning {start}.",
)  # fmt: skip
_FREE_LEADS = ("Then", "Next", "Now", "So", "Well,", "And", "Here", "Thus")
_FREE_VERBS = ("gives", "makes", "is", "means", "shows", "yields")


def _apply(value: int, sign: str, operand: int) -> int | None:
    """Return ``value sign operand``, or None where that is not a count from 1 to MAX_VALUE."""
    if sign == "/":
        result = value // operand if value % operand == 0 else 0
    else:
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
    return result if 1 <= result <= MAX_VALUE else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One operation of a story, ready to be told in either wording."""

    kind: _Kind
    operand: int
    thought: str
    """What the fixed wording says before the equation."""


def _told(steps: list[_Step], rng: random.Random | None) -> list[str]:
    """Return what precedes each equation: the fixed wording, or the free one drawn from rng."""
    if rng is None:
        return [step.thought for step in steps]
    return [
        f"{rng.choice(_FREE_LEADS)} {rng.choice(step.kind.free).format(n=step.operand)} "
        f"{rng.choice(_FREE_VERBS)}"
        for step in steps
    ]


def _chain(name: str, start: int, steps: list[_Step], rng: random.Random | None) -> str:
    """Write the chain of thought. rng: draws the free wording; None for the fixed one."""
    opening = _FIXED_OPENING if rng is None else rng.choice(_FREE_OPENINGS)
    value, lines = start, [opening.format(name=name, start=start)]
    for step, told in zip(steps, _told(steps, rng), strict=True):
        result = _apply(value, step.kind.sign, step.operand)
        assert result is not None
        lines.append(f"{told} {value}{step.kind.sign}{step.operand}={result}.")
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


def _story(rng: random.Random, wording: random.Random | None) -> Row:
    """Draw one problem. wording: draws the free wording, apart from the story; None: fixed."""
    (name, pronoun), (friend, _) = rng.sample(_PEOPLE, 2)
    objects, start = rng.choice(_OBJECTS), rng.randint(4, 40)
    possessive = "her" if pronoun == "She" else "his"
    sentences = [f"{name} has {start} {objects}."]
    steps, value = list[_Step](), start
    for _ in range(rng.randint(_MIN_STEPS, _MAX_STEPS)):
        kind, operand, value = _operation(rng, value)
        told, thought = rng.choice(kind.phrases)
        told = told.format(n=operand, o=objects, f=friend, p=possessive)
        sentences.append(f"{pronoun} {told}.")
        steps.append(_Step(kind=kind, operand=operand, thought=thought.format(n=operand)))
    sentences.append(f"How many {objects} does {name} have now?")
    return {"question": " ".join(sentences), "answer": _chain(name, start, steps, wording)}


def stories(split: Split, seed: int, wording: Wording = Wording.FIXED) -> Iterator[Row]:
    """Yield endless distinct problems of one split; the questions do not depend on the wording."""
    rng = random.Random(f"{split}:{seed}")
    words = random.Random(f"{split}:{seed}:words") if wording is Wording.FREE else None
    seen = set[str]()
    while True:
        row = _story(rng, words)
        if row["question"] not in seen and split_of(row["question"]) is split:
            seen.add(row["question"])
            yield row


def split_of(question: str) -> Split:
    """Return the split that a question belongs to: one in eight is held out, by its hash."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return Split.TRAIN if int.from_bytes(digest) % _HELDOUT_EVERY else Split.HELDOUT


def rows(split: Split, seed: int, count: int, wording: Wording = Wording.FIXED) -> list[Row]:
    """Return the first ``count`` problems of ``stories``."""
    return list(islice(stories(split, seed, wording), count))


def load(name: str) -> list[Row]:
    """Return the problems of a data name such as ``problems:train?seed=1&count=500&wording=free``.

    Raises ValueError for a name of another form. Without them, seed is 0, count DEFAULT_COUNT and
    wording fixed.
    """
    url = urlsplit(name)
    query = dict(parse_qsl(url.query))
    wording = query.pop("wording", Wording.FIXED)
    known = url.scheme == SCHEME and url.path in list(Split) and not set(query) - {"seed", "count"}
    numbers = all(value.isdecimal() for value in query.values())
    if not known or not numbers or wording not in list(Wording):
        form = "problems:train|heldout?seed=S&count=N&wording=fixed|free"
        raise ValueError(f"{name!r} is not of the form {form}")
    split = Split(url.path)
    count = int(query.get("count", DEFAULT_COUNT[split]))
    return rows(split, int(query.get("seed", 0)), count, Wording(wording))
