"""The answer in a response: outside its thinking, and written in one way where equal answers are counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.rewards.gsm8k import gsm8k
from shared.answers import ANSWERS, box_answer, last_box, number_answer, outside_thinking

TAGGED = st.lists(st.sampled_from(["<think>", "</think>", "a", "b ", "#### 7\n"]), max_size=12)


def outside_by_hand(pieces: list[str]) -> str:
    """Piece by piece: an end of thinking takes everything back, a beginning stops until then."""
    said, thinking = "", False
    for piece in pieces:
        if piece == "</think>":
            said, thinking = "", False
        elif piece == "<think>":
            thinking = True
        elif not thinking:
            said += piece
    return said


@given(TAGGED)
def test_what_stands_outside_the_thinking(pieces: list[str]) -> None:
    assert outside_thinking("".join(pieces)) == outside_by_hand(pieces)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>#### 72</think>", 0.0),
        ("<think>#### 70</think>#### 72", 1.0),
        ("#### 70</think>\n#### 72", 1.0),
        ("<think>#### 72", 0.0),
        ("#### 72 <think>#### 70", 1.0),
    ],
)
def test_gsm8k_takes_no_answer_from_the_thinking(response: str, reward: float) -> None:
    assert gsm8k(response, "72", {}) == reward


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", r"\{", "\\", "1", " "]), max_size=30))
def test_the_last_box_is_the_closed_one_that_opens_last(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = last_box(text)
    if found is None:
        assert r"\boxed{1}" not in text.replace("\\\\", "")
    else:
        assert rf"\boxed{{{found}}}" in text
        assert r"\boxed{1}" not in found
    assert last_box(text + r" \boxed{7}") == "7"


@pytest.mark.parametrize(
    "equal",
    [
        [r"\frac{1}{2}", r"\dfrac12", "0.5", "1/2", "2/4", ".50", r"$\tfrac12$", "x = 0.5", r"\frac{2}{4}."],
        ["1000", "1,000", r"1{,}000", r"1,\!000"],
        [r"\text{Evelyn}", "Evelyn", r"\textbf{evelyn}"],
        [r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"],
        ["-5", r"- 5", "-5.0", r"-\frac{10}{2}"],
        ["x+1"],
        ["1+x"],
        ["5x"],
        ["5"],
        [r"\sqrt{2}/2"],
        ["1,2"],
        ["12"],
    ],
)  # fmt: skip
def test_one_answer_in_many_spellings_is_one_vote(equal: list[str]) -> None:
    found = {box_answer(rf"so \boxed{{{text}}}") for text in equal}
    assert len(found) == 1
    assert None not in found


def test_different_answers_are_different_votes() -> None:
    texts = ["x+1", "1+x", "5x", "5", "1,2", "12", "-5", "-", r"\frac{5}{0}", "1/3", "0.333"]
    assert len({box_answer(rf"\boxed{{{text}}}") for text in texts}) == len(texts)


def test_where_there_is_no_answer_there_is_no_vote() -> None:
    for text in ("", "72", r"\boxed{}", r"\boxed{ }", r"\boxed{72", r"<think>\boxed{72}"):
        assert box_answer(text) is None
    for text in ("", "72", "####", "#### 72 or 73", "<think>#### 72"):
        assert number_answer(text) is None
    assert number_answer("#### 7.50") == number_answer("#### $15/2 a month") == "15/2"
    assert set(ANSWERS) == {"gsm8k", "math"}
