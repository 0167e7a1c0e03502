"""Semantics of the story generator: seeded, disjoint splits, right arithmetic."""

import re
from itertools import pairwise

import pytest

from trainer.problems import MAX_VALUE, Row, Split, load, rows, split_of

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


@pytest.mark.parametrize("split", list(Split))
def test_3_every_equation_is_right_follows_the_last_and_leads_to_the_final_number(
    split: Split,
) -> None:
    counts = set()
    for row in rows(split, 1, 1000):
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
    for bad in ("problems:test", "problems:train?sede=1", "gsm8k", "problems:train?seed=x"):
        with pytest.raises(ValueError, match="is not of the form"):
            load(bad)
