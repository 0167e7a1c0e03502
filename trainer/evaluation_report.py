"""What an evaluation found: a summary for programs, a table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from shared.errors import RequestError
from shared.tree import FinishReason
from trainer.data import Question
from trainer.estimators import (
    RIGHT,
    Estimate,
    estimate,
    majority_at_k,
    pass_at_k,
    quantile,
)
from trainer.samples import EvalSettings, Sample

QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A question that the servers would not sample."""

    question_id: str
    field: str
    detail: str

    @classmethod
    def of(cls, question: Question, error: RequestError) -> "Refused":
        """What an error says of a question."""
        return cls(question_id=question.id, field=error.field, detail=error.detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A question that no server answered in time, although some were ready."""

    question_id: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """What an evaluation found; `asdict` of it is `summary.json`."""

    settings: dict[str, Any]
    """`EvalSettings`."""
    questions: int
    """Answered, and counted below."""
    refused: list[Refused]
    lost: list[Lost]
    mean_reward: Estimate
    pass_at: dict[int, Estimate]
    """By k; see `estimators.pass_at_k`."""
    majority_at: dict[int, Estimate] | None
    """By k; see `estimators.majority_at_k`. None if the reward is not in `shared.answers.ANSWERS`."""
    without_answer: float | None
    """Share of samples that gave no answer; None as above."""
    unfinished: float
    """Share of samples that the token limit cut."""
    reward_errors: int
    """Samples whose reward function failed: they count as 0."""
    tokens: dict[str, float]
    """Of a response: mean, p10, p50, p90, p99, max."""
    sampled_tokens: int
    weight_versions: tuple[int, int]
    """Lowest and highest that sampled a token."""
    versions_before_resuming: tuple[int, int] | None
    """Of the samples that `--resume` found; None without."""
    models: list[str]
    servers: list[str]
    seconds: float
    """Of this command; sampling before `--resume` not counted."""

    @property
    def of_one_model(self) -> bool:
        """True if every sample came from the same weights."""
        return self.weight_versions[0] == self.weight_versions[1] and len(self.models) == 1


def versions_of(groups: Mapping[str, Sequence[Sample]]) -> tuple[int, int] | None:
    """Lowest and highest weight version of some samples; None without any."""
    spans = [v for group in groups.values() for sample in group for v, _ in sample.versions]
    return (min(spans), max(spans)) if spans else None


def summarise_samples(
    settings: EvalSettings,
    groups: Mapping[str, Sequence[Sample]],
    *,
    ks: Sequence[int],
    votes: bool,
    refused: Sequence[Refused] = (),
    lost: Sequence[Lost] = (),
    before: tuple[int, int] | None = None,
    seconds: float = 0.0,
) -> EvalSummary:
    """The summary of the answered questions.

    Args:
        settings: of the evaluation.
        groups: samples of each question, `settings.samples` of each; at least one question.
        ks: of pass@k and majority@k, each at most `settings.samples`.
        votes: whether the reward's answers are known.
        refused: questions left out.
        lost: likewise.
        before: versions of the samples that were there before.
        seconds: of the command.
    """
    every = [sample for group in groups.values() for sample in group]
    rewards = [[sample.reward for sample in group] for group in groups.values()]
    answers = [[sample.answer for sample in group] for group in groups.values()]
    right = [sum(reward >= RIGHT for reward in group) for group in rewards]
    n = settings.samples
    majority = {
        k: estimate([majority_at_k(a, r, k) for a, r in zip(answers, rewards, strict=True)])
        for k in ks
    }
    return EvalSummary(
        settings=settings.model_dump(),
        questions=len(groups),
        refused=list(refused),
        lost=list(lost),
        mean_reward=estimate([sum(group) / n for group in rewards]),
        pass_at={k: estimate([pass_at_k(n, c, k) for c in right]) for k in ks},
        majority_at=majority if votes else None,
        without_answer=share([s.answer is None for s in every]) if votes else None,
        unfinished=share([s.finish_reason is FinishReason.LENGTH for s in every]),
        reward_errors=sum(sample.reward_error is not None for sample in every),
        tokens=lengths([sample.tokens for sample in every]),
        sampled_tokens=sum(sample.tokens for sample in every),
        weight_versions=versions_of(groups) or (0, 0),
        versions_before_resuming=before,
        models=sorted({sample.model for sample in every}),
        servers=sorted({sample.server for sample in every}),
        seconds=seconds,
    )


def share(found: Sequence[bool]) -> float:
    """How much of it is true."""
    return sum(found) / len(found)


def lengths(tokens: Sequence[int]) -> dict[str, float]:
    """Mean, quantiles and maximum of response lengths.

    >>> lengths([10, 20, 30])["p50"], lengths([10, 20, 30])["mean"]
    (20.0, 20.0)
    """
    ordered = sorted(tokens)
    return {
        "mean": sum(ordered) / len(ordered),
        **{f"p{100 * q:g}": quantile(ordered, q) for q in QUANTILES},
        "max": float(ordered[-1]),
    }


def percent(value: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * value:.1f} %"


def as_json(summary: EvalSummary) -> dict[str, Any]:
    """The summary as JSON writes it."""
    return asdict(summary)


def headline(summary: EvalSummary) -> str:
    """What was measured, in one line."""
    settings = summary.settings
    return (
        f"{settings['data']}: {summary.questions} questions x {settings['samples']} samples at temperature "
        f"{settings['temperature']:g}, reward {settings['reward']}"
    )


def table(summary: EvalSummary) -> Group:
    """The summary for people."""
    shown = Table()
    shown.add_column("")
    shown.add_column("", justify="right")
    shown.add_column("standard error", justify="right")
    if summary.mean_reward.mean != summary.pass_at.get(1, summary.mean_reward).mean:
        mean = summary.mean_reward
        shown.add_row("mean reward", f"{mean.mean:.3f}", f"{mean.standard_error:.3f}")
    for name, found in (("pass", summary.pass_at), ("majority", summary.majority_at or {})):
        for k, value in found.items():
            if name == "pass" or k > 1:
                error = f"± {100 * value.standard_error:.1f}"
                shown.add_row(f"{name}@{k}", percent(value.mean), error)
    shown.add_section()
    for name, fact in _facts(summary):
        shown.add_row(name, fact)
    warnings = [Text(line, style="yellow") for line in _warnings(summary)]
    return Group(shown, *warnings)


def _facts(summary: EvalSummary) -> list[tuple[str, str]]:
    tokens = summary.tokens
    facts = [
        ("tokens/answer", f"{tokens['mean']:.0f}"),
        ("p10 / p50 / p90", " / ".join(f"{tokens[name]:.0f}" for name in ("p10", "p50", "p90"))),
        ("p99 / longest", f"{tokens['p99']:.0f} / {tokens['max']:.0f}"),
        ("unfinished", percent(summary.unfinished)),
    ]
    if summary.without_answer is not None:
        facts.append(("without an answer", percent(summary.without_answer)))
    low, high = summary.weight_versions
    facts.append(("weight version", f"{low}" if low == high else f"{low} to {high}"))
    facts.append(("seconds", f"{summary.seconds:.1f}"))
    return facts


def _warnings(summary: EvalSummary) -> list[str]:
    lines = []
    if not summary.of_one_model:
        low, high = summary.weight_versions
        before = summary.versions_before_resuming
        earlier = f" ({before[0]} to {before[1]} before --resume)" if before else ""
        lines.append(
            f"the samples are not of one model: weight versions {low} to {high}{earlier}, "
            f"{', '.join(summary.models)}"
        )
    if summary.reward_errors:
        lines.append(f"{summary.reward_errors} samples count as 0 because their reward failed")
    if summary.refused:
        first = summary.refused[0]
        lines.append(
            f"{len(summary.refused)} questions were refused and are left out; the first, question "
            f"{first.question_id}: {first.field}: {first.detail}"
        )
    if summary.lost:
        gone = summary.lost[0]
        lines.append(
            f"{len(summary.lost)} questions were not answered in time and are left out; --resume asks them again; "
            f"the first, question {gone.question_id}: {gone.detail}"
        )
    return lines
