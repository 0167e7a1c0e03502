"""Accuracy through the fleet: the same servers, the same rewards, the same weights as training."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.tree import FinishReason
from shared.wire import GroupPlan, RolloutTreeResponse
from trainer.config import DataSettings, RewardSettings
from trainer.data import Question
from trainer.fleet import Fleet
from trainer.requests import tree_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Mean reward of whole responses."""

    questions: int
    samples: int
    """Responses of each question."""
    mean: float
    """pass@1 where the reward is 0 or 1."""
    standard_error: float
    """Of the mean, over questions: samples of one question are not independent of one another."""
    unfinished: float
    """Share of responses that the token limit cut."""
    mean_tokens: float
    sampled_tokens: int
    seconds: float
    version: int
    """Lowest weight version that answered."""


def summarise(answers: Sequence[RolloutTreeResponse], seconds: float) -> Accuracy:
    """Accuracy over group plans, one a question."""
    rewards = [[leaf.reward or 0.0 for leaf in answer.leaves()] for answer in answers]
    leaves = [leaf for answer in answers for leaf in answer.leaves()]
    means = [sum(group) / len(group) for group in rewards]
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / max(1, len(means) - 1)
    sampled = sum(answer.usage.sampled_tokens for answer in answers)
    return Accuracy(
        questions=len(answers),
        samples=len(rewards[0]),
        mean=mean,
        standard_error=math.sqrt(variance / len(means)),
        unfinished=sum(leaf.finish_reason is FinishReason.LENGTH for leaf in leaves) / len(leaves),
        mean_tokens=sampled / len(leaves),
        sampled_tokens=sampled,
        seconds=seconds,
        version=min(answer.weight_versions.min for answer in answers),
    )


async def evaluate(
    fleet: Fleet,
    questions: Sequence[Question],
    *,
    data: DataSettings,
    reward: RewardSettings,
    samples: int,
    temperature: float,
    max_tokens: int,
    name: str,
    seed: int = 0,
    min_weight_version: int = 0,
    on_answer: Callable[[RolloutTreeResponse], None] = lambda answer: None,
) -> Accuracy:
    """Sample `samples` responses to every question and grade them.

    Args:
        fleet: answers.
        questions: at least one.
        data: how a question becomes a prompt.
        reward: which function grades.
        samples: responses of each question.
        temperature: 0 is greedy.
        max_tokens: bound of a response.
        name: of the occasion; see `tree_request`.
        seed: of the sampling.
        min_weight_version: lowest version that may answer.
        on_answer: called with each question's answer as it comes.

    Raises:
        RequestError, FleetError: see `Fleet.rollout_tree`.
    """
    started = time.monotonic()

    async def ask(question: Question) -> RolloutTreeResponse:
        request = tree_request(
            question,
            data=data,
            reward=reward,
            plan=GroupPlan(samples=samples),
            temperature=temperature,
            max_tokens=max_tokens,
            name=name,
            seed=seed,
            min_weight_version=min_weight_version,
        )
        answer = await fleet.rollout_tree(request)
        on_answer(answer)
        return answer

    answers = await asyncio.gather(*(ask(question) for question in questions))
    return summarise(answers, time.monotonic() - started)
