"""Accuracy through the fleet: the same servers, the same rewards, the same weights as training."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.errors import NoTreeError, RequestError
from shared.tree import FinishReason
from shared.wire import GroupPlan, RolloutTreeRequest, RolloutTreeResponse
from trainer.data import Question
from trainer.fleet import Fleet
from trainer.requests import tree_request
from trainer.settings import DataSettings, RewardSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Mean reward of whole responses."""

    questions: int
    """That were answered: all below is of these."""
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
    lost: int = 0
    """Questions that no server answered in time, although enough were alive."""


def summarise(answers: Sequence[RolloutTreeResponse], seconds: float, *, lost: int = 0) -> Accuracy:
    """Accuracy over group plans, one a question; `lost` further questions have none."""
    rewards = [[leaf.reward or 0.0 for leaf in answer.leaves()] for answer in answers]
    leaves = [leaf for answer in answers for leaf in answer.leaves()]
    means = [sum(group) / len(group) for group in rewards]
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / max(1, len(means) - 1)
    sampled = sum(a.usage.sampled_tokens + a.usage.given_tokens for a in answers)
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
        lost=lost,
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
) -> Accuracy:
    """Sample `samples` responses to every question and grade them; a question that no server answers is counted.

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

    Raises:
        RequestError: the servers refuse a question.
        FleetError: too few servers are alive, or not one question was answered.
    """
    started = time.monotonic()
    requests = [
        tree_request(
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
        for question in questions
    ]
    answers: dict[int, RolloutTreeResponse] = {}
    lost: dict[int, NoTreeError] = {}
    await ask_all(fleet, requests, on_answer=answers.__setitem__, on_lost=lost.__setitem__)
    if not answers:
        raise next(iter(lost.values()))
    in_order = [answers[place] for place in sorted(answers)]
    return summarise(in_order, time.monotonic() - started, lost=len(lost))


async def ask_all(
    fleet: Fleet,
    requests: Sequence[RolloutTreeRequest],
    *,
    on_answer: Callable[[int, RolloutTreeResponse], None],
    on_lost: Callable[[int, NoTreeError], None],
    on_refusal: Callable[[int, RequestError], None] | None = None,
) -> None:
    """Send every request; keep no answer, since those of long responses would fill the memory.

    Args:
        fleet: answers.
        requests: one a question.
        on_answer: called with a request's place and its answer, as they come.
        on_lost: called where no server gave an answer in time, although enough were alive; the others go on.
        on_refusal: called where the servers refuse a request, and the others go on; None raises it.

    Raises:
        RequestError: a refusal, without `on_refusal`.
        FleetError: too few servers are alive. The first failure ends every other request.
    """

    async def ask(place: int, request: RolloutTreeRequest) -> None:
        try:
            answer = await fleet.rollout_tree(request)
        except RequestError as error:
            if on_refusal is None:
                raise
            on_refusal(place, error)
        except NoTreeError as error:
            on_lost(place, error)
        else:
            on_answer(place, answer)

    try:
        async with asyncio.TaskGroup() as group:
            for place, request in enumerate(requests):
                group.create_task(ask(place, request))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
