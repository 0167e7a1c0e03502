"""Which step's trees are sampled when: now, or while earlier steps train.

With n = `fleet.max_staleness`, step t trains trees whose every token is of version v_t - n or later, where v_t is
the policy's version before the step. Trees of step s are admitted once

    s <= t + n                       capacity: at most (t + n + 1) x questions trees since the start

and sent once the fleet holds v_s - n, which they carry as their lowest version and servers enforce. n = 0 asks for
a step's trees when the step comes, with the version that it trains: synchronous training.
"""

import asyncio
from dataclasses import dataclass, field

from shared.errors import FleetError
from trainer.ledger import Dropped
from trainer.publication import Publication
from trainer.rollouts import Rollout, Sampling


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """The trees of one run's steps.

    Args:
        sampling: asks the fleet.
        publication: says which versions the fleet holds; None with `max_staleness` 0, where the caller waits.
        max_staleness: n.
        steps: of the run; nothing is sampled for later ones.
        first_step: from 0, where this process takes up the run.
        first_version: that the policy has before it; each step makes the next one. Older ones, which may be of a
            run before this one, never sample.
    """

    sampling: Sampling
    publication: Publication | None
    max_staleness: int
    steps: int
    first_step: int
    first_version: int
    _running: dict[int, asyncio.Task[Rollout]] = field(default_factory=dict)
    _admitted: int = -1
    """Newest step whose trees were asked for."""

    def lowest_version(self, step: int) -> int:
        """That may sample a token of the step: v_s - n."""
        version = self.first_version + step - self.first_step
        return max(self.first_version, version - self.max_staleness)

    def admit(self, step: int) -> None:
        """Ask for the trees of every step that may be sampled ahead now that `step` is the one to train."""
        if self.publication is None:
            return
        for ahead in range(step, min(step + self.max_staleness, self.steps - 1) + 1):
            if ahead > self._admitted:
                self._admitted = ahead
                self._ask()
                self._running[ahead] = asyncio.create_task(self._rollout(ahead))

    async def take(self, step: int) -> Rollout:
        """The step's trees, less those that are too old by now; counts what became of each.

        Raises:
            FleetError: none is left, or see `Sampling.step`.
            SpokeError: a version that they wait for cannot be published; see `Publication.holds`.
        """
        self.admit(step)
        lowest = self.lowest_version(step)
        if self.publication is None:
            self._ask()
            rollout = await self.sampling.step(step, lowest)
        else:
            rollout = await self._running[step]
            del self._running[step]
        rollout.drop_older(lowest)
        self.sampling.ledger.settle(len(rollout.trees), rollout.dropped)
        if not rollout.trees:
            raise FleetError(
                f"every tree of step {step + 1} has tokens of a version before {lowest}: the servers do not "
                "keep to min_weight_version"
            )
        return rollout

    @property
    def idle(self) -> bool:
        """Is no tree in flight?"""
        return all(task.done() for task in self._running.values())

    async def quiet(self) -> None:
        """Wait until no tree is in flight. What went wrong with them is raised where they are taken."""
        if self._running:
            await asyncio.wait(self._running.values())

    async def close(self, reason: Dropped) -> None:
        """Give up the trees that are in flight, and count them.

        Args:
            reason: why nothing becomes of them.
        """
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._running.clear()
        self.sampling.ledger.end(reason)

    async def _rollout(self, step: int) -> Rollout:
        assert self.publication is not None
        lowest = self.lowest_version(step)
        await self.publication.holds(lowest)
        return await self.sampling.step(step, lowest)

    def _ask(self) -> None:
        self.sampling.ledger.ask(self.sampling.settings.rollout.questions)
