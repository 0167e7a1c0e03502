"""Semantics of the story generator: seeded, disjoint splits, right arithmetic, two wordings."""

import hashlib
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from trainer.problems import MAX_VALUE, Row, Split, Wording, load, rows, split_of

ROOT = Path(__file__).resolve().parents[2]

_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)\.")


def equations(row: Row) -> list[tuple[int, str, int, int]]:
    return [(int(a), op, int(b), int(c)) for a, op, b, c in _EQUATION.findall(row["answer"])]


def evaluate(a: int, sign: str, b: int) -> float:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


def test_1_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first = rows(Split.TRAIN, 3, 200)
    assert first == rows(Split.TRAIN, 3, 200)
    assert first[:50] == rows(Split.TRAIN, 3, 50)
    others = {row["question"] for row in rows(Split.TRAIN, 4, 200)}
    assert len(others & {row["question"] for row in first}) < 5


def test_2_the_splits_are_disjoint_for_any_seeds_and_hold_no_question_twice() -> None:
    train = [row["question"] for seed in range(3) for row in rows(Split.TRAIN, seed, 3000)]
    heldout = [row["question"] for row in rows(Split.HELDOUT, 0, 600)]
    assert len(set(heldout)) == 600
    assert not set(train) & set(heldout)
    assert {split_of(q) for q in train} == {Split.TRAIN}
    assert {split_of(q) for q in heldout} == {Split.HELDOUT}


@pytest.mark.parametrize("wording", list(Wording))
@pytest.mark.parametrize("split", list(Split))
def test_3_every_equation_is_right_follows_the_last_and_leads_to_the_final_number(
    split: Split, wording: Wording
) -> None:
    counts = set()
    for row in rows(split, 1, 1000, wording):
        steps = equations(row)
        counts.add(len(steps))
        start = int(re.findall(r"\d+", row["question"])[0])
        assert steps[0][0] == start
        assert all(evaluate(a, sign, b) == c for a, sign, b, c in steps), row
        assert all(1 <= c <= MAX_VALUE for *_, c in steps), row
        assert all(before[3] == after[0] for before, after in pairwise(steps)), row
        assert row["answer"].endswith(f"\n#### {steps[-1][3]}")
        assert row["question"].count(".") == len(steps) + 1
    assert counts == {3, 4, 5, 6}


def test_4_the_story_asks_for_the_operations_that_the_chain_does() -> None:
    signs = {
        "finds": "+", "buys": "+", "gets": "+", "gives": "-", "loses": "-", "sells": "-",
        "doubles": "*", "triples": "*", "shares": "/",
    }  # fmt: skip
    special = {"buys as": "*", "gives half": "/", "loses half": "/"}
    for row in rows(Split.TRAIN, 2, 500):
        told = [s.split(" ", 1)[1] for s in row["question"].split(". ")[1:-1]]
        expected = [special.get(" ".join(t.split()[:2]), signs[t.split()[0]]) for t in told]
        assert [sign for _, sign, _, _ in equations(row)] == expected, row
        for sentence, (_, _, operand, _) in zip(told, equations(row), strict=True):
            assert {int(n) for n in re.findall(r"\d+", sentence)} <= {operand}


def test_5_names_of_data_are_resolved_and_bad_ones_refused() -> None:
    assert load("problems:train?seed=1&count=20") == rows(Split.TRAIN, 1, 20)
    assert load("problems:heldout") == rows(Split.HELDOUT, 0, 600)
    free = rows(Split.TRAIN, 1, 20, Wording.FREE)
    assert load("problems:train?seed=1&count=20&wording=free") == free
    assert load("problems:heldout?wording=fixed") == load("problems:heldout")
    for bad in (
        "problems:test", "problems:train?sede=1", "gsm8k", "problems:train?seed=x",
        "problems:train?wording=odd",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is not of the form"):
            load(bad)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        (Split.TRAIN, "3f3323529b33789ad21c09c67535150f"),
        (Split.HELDOUT, "b30af815f02bd6b27120beb3c908d322"),
    ],
)
def test_6_the_fixed_wording_is_that_of_the_quickstarts_checkpoint(
    split: Split, digest: str
) -> None:
    text = json.dumps(rows(split, 0, 1000))
    assert hashlib.blake2b(text.encode(), digest_size=16).hexdigest() == digest


@pytest.mark.parametrize("split", list(Split))
def test_7_the_free_wording_tells_the_same_equations_of_the_same_stories(split: Split) -> None:
    fixed, free = (rows(split, 3, 500, wording) for wording in Wording)
    for one, other in zip(fixed, free, strict=True):
        assert one["question"] == other["question"]
        assert equations(one) == equations(other)
        assert one["answer"].partition("####")[2] == other["answer"].partition("####")[2]
    assert sum(a["answer"] == b["answer"] for a, b in zip(fixed, free, strict=True)) == 0


def test_8_the_free_words_are_drawn_evenly_and_do_not_follow_the_story() -> None:
    answers = [row["answer"] for row in rows(Split.TRAIN, 0, 4000, Wording.FREE)]
    told = [part.split() for answer in answers for part in re.split(r"(?<=\.)\s", answer)[1:-1]]
    leads, verbs = Counter(words[0] for words in told), Counter(words[-2] for words in told)
    assert (len(leads), len(verbs)) == (8, 6)
    for counts in (leads, verbs):
        even = len(told) / len(counts)
        assert all(abs(count / even - 1) < 0.1 for count in counts.values()), counts
    # A sum's first word tells nothing of its verb: each pair is as frequent as any other.
    pairs = Counter((words[1], words[-2]) for words in told if "+" in words[-1])
    assert len(pairs) == 36
    assert all(abs(count * 36 / pairs.total() - 1) < 0.25 for count in pairs.values()), pairs


@pytest.mark.parametrize(
    ("wording", "model"), [("fixed", "quickstart/warmstart"), ("free", "compare/wordy/warmstart")]
)
def test_9_answers_fit_the_rollouts_of_their_checkpoint(wording: str, model: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "configs" / model)
    problems = rows(Split.TRAIN, 1, 1000, Wording(wording))
    lengths = [len(ids) + 1 for ids in tokenizer([p["answer"] for p in problems])["input_ids"]]
    assert 70 < sum(lengths) / len(lengths) < 85
    assert max(lengths) <= 128
