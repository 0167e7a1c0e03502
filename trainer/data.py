"""Questions with reference answers, by name.

| name                        | what                                                              |
|-----------------------------|-------------------------------------------------------------------|
| `problems:SPLIT?seed=&count=` | our own arithmetic stories (`trainer/problems.py`)              |
| `FILE.jsonl`                | one object a line                                                 |
| `gsm8k`, `gsm8k:train`      | GSM8K's test or train split, from the hub                         |
| `math500`                   | MATH-500, from the hub; its fields are `problem` and `answer`     |
| `hub:NAME[:CONFIG]:SPLIT`   | any data set of the hub, through `datasets`                       |
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from trainer import problems

GSM8K = "openai/gsm8k:main"
MATH500 = "HuggingFaceH4/MATH-500:test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """How a data set is usually asked and graded, where nobody says otherwise."""

    question_field: str = "question"
    answer_field: str = "answer"
    prompt: str = "{question}\n"
    reward: str = "gsm8k"


def usual(name: str) -> Usual:
    """What is usual for a data set, by its name."""
    if name == "math500":
        return Usual(
            question_field="problem",
            prompt="{question}\nReason step by step and put the final answer into \\boxed{}.\n",
            reward="math",
        )
    if name == "gsm8k" or name.startswith("gsm8k:"):
        return Usual(
            prompt="Question: {question}\nThink step by step and end with #### and the number.\nAnswer:"
        )
    return Usual()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and what its answer is graded against."""

    id: str
    """Position in its data set; stable for one name."""
    text: str
    reference: str


def load(
    name: str, *, question_field: str = "question", answer_field: str = "answer"
) -> list[Question]:
    """All questions of a data set.

    Raises:
        ConfigError: the data cannot be had, or a row lacks a field; it names the file and the line.
    """
    rows: Iterable[Mapping[str, Any]]
    if name.startswith(f"{problems.SCHEME}:"):
        try:
            rows = problems.load(name)
        except ValueError as error:
            raise ConfigError(f"data {name}: {error}") from None
    elif name == "gsm8k" or name.startswith("gsm8k:"):
        rows = _from_hub(f"{GSM8K}:{name.partition(':')[2] or 'test'}")
    elif name == "math500":
        rows = _from_hub(MATH500)
    elif name.startswith("hub:"):
        rows = _from_hub(name.removeprefix("hub:"))
    else:
        rows = list(_from_file(Path(name)))
    questions = [
        _question(row, position, name, question_field, answer_field)
        for position, row in enumerate(rows)
    ]
    if not questions:
        raise ConfigError(f"data {name}: it holds no questions")
    return questions


def _question(
    row: Mapping[str, Any], position: int, name: str, question: str, answer: str
) -> Question:
    for field in (question, answer):
        if field not in row:
            raise ConfigError(
                f"data {name}, row {position + 1}: no field {field!r}; it has {sorted(row)}; "
                "set data.question_field and data.answer_field"
            )
    return Question(id=str(position), text=str(row[question]), reference=str(row[answer]))


def _from_file(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"data {path}: {error.strerror}; give a JSONL file or a data set's name"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"data {path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"data {path}, line {number}: an object is needed")
        yield row


def _from_hub(name: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    repository, *rest = name.split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "test")
    try:
        return list(datasets.load_dataset(repository, config, split=split))
    except Exception as error:  # the hub's client raises many kinds, and all mean: not to be had
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"data {name}: the hub does not give it: {first}") from None


class Draw:
    """Questions for each step: every one once, in a seeded order, before any comes again.

    The order depends on the seed and the step alone, so that a resumed run draws what it would have drawn.

    Args:
        questions: the whole data set.
        per_step: questions a step.
        seed: of the order.
    """

    def __init__(self, questions: list[Question], per_step: int, seed: int) -> None:
        self._questions = questions
        self._per_step = per_step
        self._seed = seed

    def step(self, step: int) -> list[Question]:
        """[per_step] questions of one step; no question twice in it where there are enough."""
        size = len(self._questions)
        places = range(step * self._per_step, (step + 1) * self._per_step)
        orders = {epoch: self._order(epoch) for epoch in {place // size for place in places}}
        return [self._questions[orders[place // size][place % size]] for place in places]

    def others(self, step: int, used: set[str], count: int) -> list[Question]:
        """At most `count` questions that are not among `used` (ids), by the seed and the step alone."""
        if count <= 0:
            return []
        free = [question for question in self._questions if question.id not in used]
        rng = random.Random(f"{self._seed}/{step}/others/{len(used)}")
        return rng.sample(free, min(count, len(free)))

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._questions)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
