"""The samples of an evaluation on disk: written as answers come, so that a killed one goes on where it stopped.

A folder holds `settings.json` (what was asked, and how), `samples.jsonl` (one line a sample, a question's lines at
once) and, at the end, `summary.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.answers import ANSWERS
from shared.errors import ConfigError
from shared.tree import FinishReason
from shared.wire import RolloutTreeResponse
from trainer.data import Question


class EvalSettings(BaseModel):
    """What makes one evaluation: samples of different settings never share a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    question_field: str
    answer_field: str
    prompt: str
    chat: bool
    reward: str
    samples: int
    temperature: float
    max_tokens: int
    seed: int


class Sample(BaseModel):
    """One response: a line of `samples.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question_id: str
    sample: int
    """From 0 in each question."""
    question: str
    reference: str
    response: str
    answer: str | None
    """What votes in a majority; None where there is none, or where the reward's answers are not known."""
    reward: float
    reward_error: str | None
    finish_reason: FinishReason | None
    tokens: int
    versions: list[tuple[int, int]]
    """Run-length spans [weight version, token count]."""
    server: str
    model: str


def samples_of(question: Question, answer: RolloutTreeResponse, reward: str) -> list[Sample]:
    """The samples of a group plan, in order."""
    find = ANSWERS.get(reward)
    return [
        Sample(
            question_id=question.id,
            sample=number,
            question=question.text,
            reference=question.reference,
            response=leaf.text or "",
            answer=find(leaf.text or "") if find else None,
            reward=leaf.reward or 0.0,
            reward_error=leaf.reward_error,
            finish_reason=leaf.finish_reason,
            tokens=len(leaf.token_ids),
            versions=leaf.versions,
            server=answer.server_id,
            model=answer.model,
        )
        for number, leaf in enumerate(answer.leaves())
    ]


@dataclass(slots=True, kw_only=True)
class SampleFile:
    """Samples of one evaluation, by question.

    Args:
        folder: made with the first samples.
        settings: of the evaluation.
    """

    folder: Path
    settings: EvalSettings
    groups: dict[str, list[Sample]] = field(default_factory=dict)
    """Samples of each answered question."""

    @classmethod
    def new(cls, folder: Path, settings: EvalSettings) -> "SampleFile":
        """An evaluation that begins.

        Raises:
            ConfigError: the folder holds another one.
        """
        if (folder / "samples.jsonl").exists():
            raise ConfigError(
                f"--out {folder}: it holds an evaluation; go on with --resume, or choose another"
            )
        return cls(folder=folder, settings=settings)

    @classmethod
    def resume(
        cls, folder: Path, settings: EvalSettings, questions: Sequence[Question]
    ) -> "SampleFile":
        """An evaluation that goes on: what is whole in the folder counts, what a kill left half is cut off.

        Raises:
            ConfigError: there is none, it was made with other settings or other questions, or its file is
                damaged elsewhere than at its end.
        """
        try:
            made_with = EvalSettings.model_validate_json((folder / "settings.json").read_bytes())
        except OSError as error:
            raise ConfigError(
                f"--resume: {folder / 'settings.json'}: {error.strerror}; start without --resume"
            ) from None
        except ValidationError as error:
            raise ConfigError(f"--resume: {folder / 'settings.json'}: {error}") from None
        _refuse_other_settings(folder, made_with, settings)
        groups = _read_whole_groups(folder / "samples.jsonl", settings.samples)
        _refuse_other_questions(folder, groups, questions)
        return cls(folder=folder, settings=settings, groups=groups)

    def append(self, samples: Sequence[Sample]) -> None:
        """Write a question's samples.

        Raises:
            ConfigError: the folder cannot be written.
        """
        lines = "".join(sample.model_dump_json() + "\n" for sample in samples)
        try:
            if not self.groups:
                self.folder.mkdir(parents=True, exist_ok=True)
                settings = self.settings.model_dump_json(indent=1)
                (self.folder / "settings.json").write_text(settings + "\n")
            # One write for all of them: what a kill can leave is a tail, and `resume` cuts it off.
            with (self.folder / "samples.jsonl").open("ab", buffering=0) as stream:
                stream.write(lines.encode())
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: {error.strerror}") from None
        self.groups[samples[0].question_id] = list(samples)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` beside the samples."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _refuse_other_settings(folder: Path, before: EvalSettings, now: EvalSettings) -> None:
    for name, value in before:
        if value != getattr(now, name):
            raise ConfigError(
                f"--resume: {folder} was sampled with {name} = {value!r}, not {getattr(now, name)!r}; "
                "give the same, or another --out"
            )


def _refuse_other_questions(
    folder: Path, groups: dict[str, list[Sample]], questions: Sequence[Question]
) -> None:
    known = {question.id: (question.text, question.reference) for question in questions}
    for question_id, (first, *_) in groups.items():
        if known.get(question_id, (first.question, first.reference)) != (
            first.question,
            first.reference,
        ):
            raise ConfigError(
                f"--resume: question {question_id} of {folder} is not the one that data has now: it changed; "
                "choose another --out"
            )


def _read_whole_groups(path: Path, samples: int) -> dict[str, list[Sample]]:
    """Samples by question; the file is cut after the last question that has all of its lines.

    Raises:
        ConfigError: a line before that is damaged.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = data.splitlines(keepends=True)
    read: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                break
            read.append(Sample.model_validate_json(line))
        except ValidationError as error:
            if number == len(lines):
                break
            first = error.errors()[0]["msg"]
            raise ConfigError(f"{path}, line {number}: {first}; choose another --out") from None
    groups = {key: list(group) for key, group in groupby(read, lambda sample: sample.question_id)}
    if groups and len(groups[read[-1].question_id]) < samples:
        del groups[read[-1].question_id]
    kept = sum(len(group) for group in groups.values())
    size = sum(len(line) for line in lines[:kept])
    if size < len(data):
        with path.open("r+b") as stream:
            stream.truncate(size)
    return groups
