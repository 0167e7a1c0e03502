"""A step's trees: one for each question, and for the questions that come in place of those without signal."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.errors import FleetError, NoTreeError, RequestError
from shared.wire import RolloutTreeResponse
from trainer.algorithms import AlgorithmName, AlgorithmSettings, Segment, advantages
from trainer.algorithms.ppo import responses
from trainer.config import TrainSettings
from trainer.data import Draw, Question
from trainer.fleet import Fleet
from trainer.ledger import Dropped, Ledger
from trainer.overlong import penalise
from trainer.requests import tree_request


@dataclass(slots=True, kw_only=True)
class Rollout:
    """What one step sampled."""

    trees: list[RolloutTreeResponse] = field(default_factory=list)
    """Those that train, in the order of their questions; replacements last."""
    without_signal: list[RolloutTreeResponse] = field(default_factory=list)
    """Those that were replaced: sampled, paid for, and without any gradient."""
    too_old: list[RolloutTreeResponse] = field(default_factory=list)
    """Those with a token of a version that must not train any more."""
    refusals: list[RequestError] = field(default_factory=list)
    lost: list[NoTreeError] = field(default_factory=list)
    """Of those that no server gave."""

    @property
    def sampled(self) -> list[RolloutTreeResponse]:
        """Every tree that the servers sampled."""
        return self.trees + self.without_signal + self.too_old

    @property
    def dropped(self) -> dict[str, int]:
        """How many trees do not train, by reason; see `ledger`."""
        reasons = Counter(f"refused: {refusal.field}" for refusal in self.refusals)
        reasons[Dropped.NO_SERVER] = len(self.lost)
        reasons[Dropped.NO_SIGNAL] = len(self.without_signal)
        reasons[Dropped.TOO_OLD] = len(self.too_old)
        return {str(reason): count for reason, count in reasons.items() if count}

    def drop_older(self, version: int) -> None:
        """Set trees aside that have a token of a version before this one."""
        self.too_old += [tree for tree in self.trees if tree.weight_versions.min < version]
        self.trees = [tree for tree in self.trees if tree.weight_versions.min >= version]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Asks the fleet for trees.

    Args:
        settings: of the run.
        fleet: answers.
        draw: the questions.
        session: part of every request id: a resumed run never gets the trees of the one before it.
        ledger: counts questions that come in place of others; those of a step itself count when it is admitted.
    """

    settings: TrainSettings
    fleet: Fleet
    draw: Draw
    session: str
    ledger: Ledger = field(default_factory=Ledger)

    async def step(self, step: int, version: int) -> Rollout:
        """One tree for each of the step's questions.

        A question that the servers refuse is dropped and counted: it would be refused again. So is a tree that no
        server gives, though enough are alive. With
        `rollout.resample`, questions whose tree gives no gradient are replaced by others, at most so many a step.

        Args:
            step: from 0.
            version: lowest weight version that may sample.

        Raises:
            FleetError: too few servers for longer than a pause may take, or not one tree could be had.
        """
        rollout = Rollout()
        questions = self.draw.step(step)
        left = self.settings.rollout.resample
        used = {question.id for question in questions}
        while questions:
            answers = await asyncio.gather(*(self._tree(step, version, q) for q in questions))
            fruitless = self._sort(answers, rollout, keep_all=not self.settings.rollout.resample)
            questions = self.draw.others(step, used, min(fruitless, left))
            left -= len(questions)
            self.ledger.ask(len(questions))
            used |= {question.id for question in questions}
        if not rollout.trees and rollout.without_signal:
            # All in vain: the step goes on with what there is, and trains nothing.
            rollout.trees, rollout.without_signal = rollout.without_signal, []
        if not rollout.trees:
            reason = [*rollout.refusals, *rollout.lost][0]
            raise FleetError(
                f"the servers gave no tree for any question of step {step + 1}; of one they say: {reason}"
            )
        return rollout

    def _sort(
        self,
        answers: Iterable[RolloutTreeResponse | RequestError | NoTreeError],
        rollout: Rollout,
        *,
        keep_all: bool,
    ) -> int:
        """Put each answer where it belongs; how many have no signal and were not kept."""
        fruitless = 0
        for answer in answers:
            if isinstance(answer, RequestError):
                rollout.refusals.append(answer)
            elif isinstance(answer, NoTreeError):
                rollout.lost.append(answer)
            elif keep_all or has_signal(answer, self.settings.algorithm):
                rollout.trees.append(answer)
            else:
                rollout.without_signal.append(answer)
                fruitless += 1
        return fruitless

    async def _tree(
        self, step: int, version: int, question: Question
    ) -> RolloutTreeResponse | RequestError | NoTreeError:
        settings = self.settings
        request = tree_request(
            question,
            data=settings.data,
            reward=settings.reward,
            plan=settings.rollout.plan,
            temperature=settings.rollout.temperature,
            max_tokens=settings.rollout.max_tokens,
            name=f"{settings.run}/{self.session}/step-{step}",
            seed=settings.seed * 1_000_003 + step if settings.rollout.reproducible else None,
            savings=settings.rollout.savings,
            min_weight_version=version,
            in_flight=settings.rollout.in_flight,
        )
        try:
            tree = await self.fleet.rollout_tree(request)
        except (RequestError, NoTreeError) as error:
            return error
        return penalise(
            tree,
            limit=settings.rollout.max_tokens,
            buffer=settings.algorithm.overlong_buffer,
            penalty=settings.algorithm.overlong_penalty,
        )


def segments_of(tree: RolloutTreeResponse, settings: AlgorithmSettings) -> list[Segment]:
    """What a tree trains, under any algorithm; ppo's responses still wait for its critic."""
    if settings.name is AlgorithmName.PPO:
        return responses(tree)
    return advantages(tree, settings)


def has_signal(tree: RolloutTreeResponse, settings: AlgorithmSettings) -> bool:
    """True if the tree gives any gradient; under ppo, if its rewards differ, as DAPO has it (arXiv 2503.14476)."""
    segments = segments_of(tree, settings)
    if settings.name is AlgorithmName.PPO:
        return len({segment.advantage for segment in segments}) > 1
    return any(abs(segment.advantage) > settings.zero_tolerance for segment in segments)
