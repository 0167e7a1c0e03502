"""Rewards of a tree's leaves: of the whole response, never of the prompt or a continuation alone."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from server.branches import Branch, walk
from server.details import unquoted
from server.respond import OFF_LOOP_TOKENS
from server.rewards.pool import RewardPool
from server.tokens import Tokens
from shared.tree import FinishReason
from shared.wire import Reward


@dataclass(frozen=True, slots=True)
class Graded:
    """Reward of one leaf, and why its reward function failed if it did."""

    reward: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Grading:
    """Grades each leaf of one tree once, whenever it is asked to.

    Args:
        tokens: decodes responses.
        rewards: grades texts.
        reward: what the request asks for; None for no rewards.
        grades: of the leaves so far.
    """

    tokens: Tokens
    rewards: RewardPool
    reward: Reward | None
    grades: dict[Branch, Graded] = field(default_factory=dict)

    async def below(self, node: Branch) -> list[Graded]:
        """Grades of all leaves below a node; none where no reward is asked for.

        A leaf that stands below several nodes is graded once.
        """
        if self.reward is None:
            return []
        leaves = dict.fromkeys(
            place.branch
            for place in walk(node)
            if place.parent is not None and not place.branch.children
        )
        finished = [leaf for leaf in leaves if leaf not in self.grades and not self._known(leaf)]
        decode = partial(self._texts, finished)
        large = sum(len(leaf.response) for leaf in finished) >= OFF_LOOP_TOKENS
        texts = await asyncio.to_thread(decode) if large else decode()
        reward = self.reward
        with unquoted(reward):
            graded = await self.rewards.grade(reward.name, texts, reward.reference, reward.options)
        for leaf, given in zip(finished, graded, strict=True):
            self.grades[leaf] = Graded(given.reward, given.error)
        return [self.grades[leaf] for leaf in leaves]

    def _texts(self, leaves: Sequence[Branch]) -> list[str]:
        return [self.tokens.decode(leaf.response) for leaf in leaves]

    def _known(self, leaf: Branch) -> bool:
        """Is a leaf's reward known without its text? Notes it then."""
        assert leaf.completion is not None, "only the prompt has no completion"
        assert self.reward is not None, "only asked where rewards are"
        match leaf.completion.finish_reason:
            case FinishReason.STOP:
                return False
            case FinishReason.LENGTH:
                unfinished = float(self.reward.options.get("unfinished", 0.0))
                self.grades[leaf] = Graded(unfinished)
            case FinishReason.ABORT:
                self.grades[leaf] = Graded(0.0, "the engine aborted this response")
        return True
