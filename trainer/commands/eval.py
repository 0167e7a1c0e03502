"""`spoke eval`: accuracy on a data set, sampled and graded by the servers, with every sample kept."""

import argparse
import asyncio
import contextlib
import json
import math
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared.answers import ANSWERS
from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, CoordinationError, NoTreeError, RequestError
from shared.wire import GroupPlan, RolloutTreeRequest, RolloutTreeResponse
from trainer.data import Question, load, usual
from trainer.estimators import default_ks
from trainer.evaluate import ask_all
from trainer.evaluation_report import (
    EvalSummary,
    Lost,
    Refused,
    as_json,
    headline,
    summarise_samples,
    table,
    versions_of,
)
from trainer.fleet import Fleet, fixed, registered
from trainer.requests import tree_request
from trainer.samples import EvalSettings, SampleFile, samples_of
from trainer.settings import DataSettings, RewardSettings


@contextlib.asynccontextmanager
async def fleet_of(args: argparse.Namespace, timeout_s: float) -> AsyncIterator[Fleet]:
    """The fleet that `--server` or `--run` names."""
    async with contextlib.AsyncExitStack() as stack:
        if args.server is not None:
            servers = fixed(args.server)
        else:
            coordinator = RedisCoordinator(args.redis_url, args.run)
            stack.push_async_callback(coordinator.close)
            await coordinator.ping()
            servers = registered(coordinator)
        fleet = Fleet(servers, timeout_s=timeout_s)
        stack.push_async_callback(fleet.close)
        yield fleet


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """One evaluation on its way."""

    settings: EvalSettings
    questions: list[Question]
    ks: list[int]
    file: SampleFile
    refused: list[Refused] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    first_failure: RequestError | NoTreeError | None = None

    @property
    def answered(self) -> int:
        """Questions that have their samples."""
        return sum(question.id in self.file.groups for question in self.questions)

    @property
    def kept(self) -> str:
        """What there is on disk, and how to go on."""
        if not self.answered:
            return "no question was answered yet"
        return (
            f"{self.answered} of {len(self.questions)} questions are in {self.file.folder}: the same command with "
            f"--out {self.file.folder} --resume asks the others"
        )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print a table, or JSON.

    Returns:
        0; 1 where servers refused some of the questions, or did not answer them; 130 after Ctrl-C.

    Raises:
        ConfigError: an argument, the data or `--out` cannot be used.
        RequestError: the servers refused every question.
        CoordinationError: no server is ready, or none answered any question; what was sampled is kept.
    """
    evaluation = prepare(args)
    before = versions_of(evaluation.file.groups)
    started = time.monotonic()
    try:
        asyncio.run(sample(evaluation, args))
    except KeyboardInterrupt:
        print(f"spoke eval: interrupted; {evaluation.kept}", file=sys.stderr)
        return 130
    except CoordinationError as error:
        raise CoordinationError(f"{error}; {evaluation.kept}") from None
    if not evaluation.answered:
        assert evaluation.first_failure is not None, (
            "a question is answered, refused, lost, or raises"
        )
        raise evaluation.first_failure
    summary = summarise_samples(
        evaluation.settings,
        {q.id: evaluation.file.groups[q.id] for q in evaluation.questions if q.id in evaluation.file.groups},
        ks=evaluation.ks,
        votes=evaluation.settings.reward in ANSWERS,
        refused=evaluation.refused,
        lost=evaluation.lost,
        before=before,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    show(summary, evaluation.file, as_object=args.json)
    return 1 if evaluation.refused or evaluation.lost else 0


def prepare(args: argparse.Namespace) -> Evaluation:
    """Read the data and open the folder; nothing is sent yet.

    Raises:
        ConfigError: an argument, the data or the folder cannot be used.
    """
    own = usual(args.data)
    settings = EvalSettings(
        data=args.data,
        question_field=args.question_field or own.question_field,
        answer_field=args.answer_field or own.answer_field,
        prompt=own.prompt if args.prompt is None else args.prompt.replace("\\n", "\n"),
        chat=args.chat,
        reward=args.reward or own.reward,
        samples=args.samples,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    if settings.samples < 1 or (args.questions is not None and args.questions < 1):
        raise ConfigError("--samples and --questions are at least 1")
    if "{question}" not in settings.prompt:
        raise ConfigError(f"--prompt {settings.prompt!r}: it needs {{question}}")
    ks = default_ks(settings.samples) if args.k is None else parse_ks(args.k, settings.samples)
    if args.resume and args.out is None:
        raise ConfigError("--resume: give the folder to go on with as --out DIR")
    questions = load(
        args.data, question_field=settings.question_field, answer_field=settings.answer_field
    )
    folder: Path = args.out or default_folder(args.data)
    new, resume = SampleFile.new, SampleFile.resume
    file = resume(folder, settings, questions) if args.resume else new(folder, settings)
    return Evaluation(settings=settings, questions=questions[: args.questions], ks=ks, file=file)


def parse_ks(text: str, samples: int) -> list[int]:
    """Values of `--k`, ascending.

    Raises:
        ConfigError: they are no numbers from 1 to the number of samples.

    >>> parse_ks("8,1", 8)
    [1, 8]
    """
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--k {text}: write numbers such as 1,4,8") from None
    if not 1 <= ks[0] <= ks[-1] <= samples:
        raise ConfigError(f"--k {text}: each is from 1 to --samples {samples}")
    return ks


def default_folder(data: str) -> Path:
    """Where samples go when nobody says: `runs/eval-DATA-DATE-TIME`."""
    name = re.sub(r"[^\w.]+", "-", Path(data).stem if data.endswith(".jsonl") else data)
    return Path("runs") / f"eval-{name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"


async def sample(evaluation: Evaluation, args: argparse.Namespace) -> None:
    """Ask for what is missing, and write the samples as they come."""
    settings, file = evaluation.settings, evaluation.file
    missing = [question for question in evaluation.questions if question.id not in file.groups]
    if not missing:
        return
    requests = requests_of(settings, missing)
    rewards = [sample.reward for group in file.groups.values() for sample in group]
    with bar() as progress:
        task = progress.add_task("", total=len(evaluation.questions), completed=evaluation.answered)

        def on_answer(place: int, answer: RolloutTreeResponse) -> None:
            samples = samples_of(missing[place], answer, settings.reward)
            file.append(samples)
            rewards.extend(sample.reward for sample in samples)
            mean = math.fsum(rewards) / len(rewards)
            progress.update(task, advance=1, description=f"mean reward {mean:.3f}")

        def on_refusal(place: int, error: RequestError) -> None:
            evaluation.first_failure = evaluation.first_failure or error
            evaluation.refused.append(Refused.of(missing[place], error))
            progress.advance(task)

        def on_lost(place: int, error: NoTreeError) -> None:
            evaluation.first_failure = evaluation.first_failure or error
            evaluation.lost.append(Lost(question_id=missing[place].id, detail=str(error)))
            progress.advance(task)

        async with fleet_of(args, args.timeout) as fleet:
            await ask_all(
                fleet, requests, on_answer=on_answer, on_lost=on_lost, on_refusal=on_refusal
            )


def requests_of(settings: EvalSettings, questions: Sequence[Question]) -> list[RolloutTreeRequest]:
    """One group of samples of each question.

    Raises:
        ConfigError: a setting is out of bounds.
    """
    name = f"eval/{secrets.token_hex(4)}"
    try:
        data = DataSettings(
            train=settings.data, heldout=settings.data, prompt=settings.prompt, chat=settings.chat
        )
        return [
            tree_request(
                question,
                data=data,
                reward=RewardSettings(name=settings.reward),
                plan=GroupPlan(samples=settings.samples),
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                name=name,
                seed=settings.seed,
                text=True,
            )
            for question in questions
        ]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"the request cannot be made: {where}: {first['msg']}") from None


def bar() -> Progress:
    """Questions answered, on stderr, while there is a terminal."""
    return Progress(
        TextColumn("questions"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


def show(summary: EvalSummary, file: SampleFile, *, as_object: bool) -> None:
    """Keep the summary beside the samples, and print it."""
    found = as_json(summary)
    file.write_summary(found)
    if as_object:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    console.print(headline(summary), highlight=False, soft_wrap=True)
    console.print(table(summary))
    console.print(f"every sample: {file.folder / 'samples.jsonl'}", highlight=False, soft_wrap=True)
