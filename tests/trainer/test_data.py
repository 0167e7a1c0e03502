"""Data sets by name, and the order in which a run draws them."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from trainer.data import Draw, Question, load


def questions(count: int) -> list[Question]:
    return [Question(id=str(i), text=f"q{i}", reference=str(i)) for i in range(count)]


def test_gsm8k_rows_are_read_as_they_are(gsm8k: Path) -> None:
    rows = load(str(gsm8k / "test.jsonl"))
    assert len(rows) == 1319
    assert rows[0].text.startswith("Janet")
    assert rows[0].reference.endswith("#### 18")


def test_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "1+1", "solution": "2"}\n\n')
    assert load(str(path), question_field="problem", answer_field="solution")[0].reference == "2"
    with pytest.raises(
        ConfigError, match=r"row 1: no field 'question'; it has \['problem', 'solution'\]"
    ):
        load(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no questions"), ("{", "line 1: not JSON"), ("3", "line 1: an object is needed")],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_missing_files_and_unknown_names() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load("none.jsonl")
    with pytest.raises(ConfigError, match="problems:nothing"):
        load("problems:nothing")


def test_a_data_set_of_the_hub_is_loaded_by_name(tmp_path: Path, monkeypatch) -> None:
    """The hub cannot be reached here: `datasets` loads a local folder by the same call."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert load(f"hub:{folder}:train") == [Question(id="0", text="1+1?", reference="#### 2")]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_every_question_comes_once_before_any_comes_again(
    size: int, per_step: int, seed: int
) -> None:
    draw = Draw(questions(size), per_step, seed)
    drawn = [q.id for step in range(4) for q in draw.step(step)]
    counts = Counter(drawn)
    assert max(counts.values()) - min(counts.get(str(i), 0) for i in range(size)) <= 1
    assert draw.step(3) == Draw(questions(size), per_step, seed).step(3)


def test_another_seed_is_another_order() -> None:
    assert Draw(questions(50), 50, 0).step(0) != Draw(questions(50), 50, 1).step(0)
