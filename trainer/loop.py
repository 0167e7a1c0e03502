"""The training loop, top to bottom: rollout, advantages, update, publish, measure.

    questions -> trees (fleet) -> segments with advantages -> optimizer updates -> version v+1 -> fleet -> …

With `fleet.max_staleness` 0 it is synchronous: the next rollout waits until every live server holds the weights of
the last update, so every token is sampled by the policy that the update starts from. Above 0, trees of the next
steps are sampled while a step trains, and versions reach the fleet in the background; see `pipeline`.
"""

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shared.errors import CheckpointError, LeaseError, SpokeError
from shared.fleet import Head, ServerRecord
from shared.wire import RolloutTreeResponse
from trainer import metrics
from trainer.algorithms import Segment
from trainer.checkpoints import Progress
from trainer.config import TrainSettings
from trainer.ledger import Dropped
from trainer.measuring import Measuring
from trainer.packing import optimizer_batches
from trainer.pipeline import Pipeline
from trainer.policy import DTYPES, state_tensors
from trainer.prepare import Connections
from trainer.publication import Publication
from trainer.replay import Replay
from trainer.report import Reporter, Summary
from trainer.rollouts import segments_of
from trainer.saving import Saving
from trainer.stopping import Stop
from trainer.update import Learner, UpdateReport

NOT_TRAINING = frozenset({"measure", "checkpoint"})
"""Phases that no budget counts: no tree of training is in flight in any of them."""
STOP_GRACE_S = 10.0
"""That a publication has when the run is told to stop: without Redis or store it would wait for its bound."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run in progress."""

    settings: TrainSettings
    learner: Learner
    replay: Replay | None
    to: Connections
    publication: Publication | None
    """None in synchronous training."""
    pipeline: Pipeline
    measuring: Measuring
    saving: Saving
    stop: Stop
    reporter: Reporter
    summary: Summary
    log: metrics.MetricsLog
    progress: Progress
    earlier_seconds: float = 0.0
    """Spent on training before this process resumed the run."""

    async def run(self) -> Summary:
        """Train from where the run stands to its last step, or to the end of its budget.

        Raises:
            StoppedError: it was told to stop; of the last step that was done, if any, there is a checkpoint.
        """
        total = self.settings.trainer.steps
        unused = Dropped.STOPPED
        try:
            await self.publish(self.pipeline.first_version, wait=True)
            await self.measure("before")
            for step in range(self.progress.step, total):
                if self.share >= 1:
                    break
                before = self.share
                await self.step(step)
                await self.finish_step(step + 1, before)
            unused = Dropped.UNUSED
            await self.measure("after")
        except SpokeError as error:
            await self.pipeline.close(unused)
            # After a LeaseError the run is another trainer's, and so may be its folder.
            if not isinstance(error, LeaseError | CheckpointError):
                await self.keep()
            raise
        finally:
            await self.pipeline.close(unused)
        return self.summary

    @property
    def share(self) -> float:
        """How much of the run is done, by steps or by whichever budget is nearer its end; 1 is all."""
        settings, progress = self.settings.trainer, self.progress
        return max(
            progress.step / settings.steps,
            progress.sampled_tokens / (settings.budget_tokens or math.inf),
            progress.seconds / (settings.budget_seconds or math.inf),
        )

    @property
    def seconds(self) -> float:
        """Spent on training so far."""
        return self.earlier_seconds + self.summary.seconds_of_training(NOT_TRAINING)

    async def step(self, step: int) -> None:
        """One iteration. A step that was trained is on record although its weights cannot be published."""
        before = dict(self.summary.seconds)
        values = await self.train(step)
        try:
            await self.publish(self.progress.version + 1, wait=self.publication is None)
        except SpokeError as error:
            if not isinstance(error, LeaseError):
                self.record(values, before)
            raise
        self.progress = replace(self.progress, seconds=self.seconds)
        if self.share < 1:
            self.pipeline.admit(step + 1)
        self.record(values, before)

    def record(self, values: dict[str, Any], before: Mapping[str, float]) -> None:
        """Write down the step that was done last.

        Args:
            values: metrics of its training.
            before: seconds by phase before it.
        """
        trees, step = self.summary.trees.as_json(), self.progress.step
        self.progress = replace(self.progress, seconds=self.seconds, trees=trees)
        self.summary.add_step(values["reward"]["mean"], self.progress)
        spent = {name: s - before.get(name, 0.0) for name, s in self.summary.seconds.items()}
        values |= {
            "ledger": trees,
            "version": self.progress.version,
            "seconds": spent,
            "published": [asdict(report) for report in self.to.publisher.reports()],
        }
        self.log.write(step, values)
        self.reporter.step(step, self.settings.trainer.steps, values)

    async def train(self, step: int) -> dict[str, Any]:
        """Rollout, advantages, update; returns their metrics."""
        with self.summary.phase("rollout"):
            self.reporter.status("rollout")
            rollout = await self.stop.unless(self.pipeline.take(step))
        with self.summary.phase("advantages"):
            fresh = await asyncio.to_thread(self.advantages, rollout.trees)
            segments = self.replayed(fresh, step)
        with self.summary.phase("update"):
            # In a thread, so that the lease is renewed meanwhile.
            updates = await asyncio.to_thread(self.learn, segments, step)
        sampled = metrics.of_trees(rollout.sampled)
        self.progress = replace(
            self.progress,
            step=step + 1,
            sampled_tokens=self.progress.sampled_tokens + sampled["tokens"]["sampled"],
        )
        return {
            **sampled,
            **metrics.of_segments(fresh, rollout.trees),
            **metrics.of_updates(updates),
            **metrics.of_replay(self.replay, segments),
            **metrics.of_staleness(segments, self.progress.version),
            "replaced_trees": len(rollout.without_signal),
            "dropped_trees": rollout.dropped,
            "request_ids": [tree.request_id for tree in rollout.trees],
            "sampled_tokens_total": self.progress.sampled_tokens,
        }

    def advantages(self, trees: Sequence[RolloutTreeResponse]) -> list[Segment]:
        """The step's segments with their advantages; under ppo, from the critic as it stands before the update."""
        algorithm = self.settings.algorithm
        segments = [segment for tree in trees for segment in segments_of(tree, algorithm)]
        critic = self.learner.critic
        return segments if critic is None else critic.estimate(segments, algorithm)

    def replayed(self, fresh: Sequence[Segment], step: int) -> Sequence[Segment]:
        """What trains in this step: the fresh segments, or a choice of all that wait."""
        if self.replay is None:
            return fresh
        self.replay.add(fresh, step)
        return self.replay.take(step)

    def learn(self, segments: Sequence[Segment], step: int) -> list[UpdateReport]:
        """The step's optimizer updates, each on its share of the trees."""
        self.reporter.status("update")
        settings = self.settings.trainer
        if settings.budget_tokens or settings.budget_seconds:
            self.learner.follow(self.share)
        proximal = self.learner.proximal(segments)
        reports = []
        for epoch in range(settings.epochs):
            rng = random.Random(f"{self.settings.seed}/{step}/{epoch}")
            for batch in optimizer_batches(segments, settings.updates_per_step, rng):
                reports.append(self.learner.update(batch, proximal))
        return reports

    async def publish(self, version: int, *, wait: bool) -> None:
        """Hand the weights to the fleet.

        Args:
            version: their number.
            wait: until the fleet holds them; else the next rollouts wait for that, and training goes on as soon as
                the weights are copied.

        Raises:
            StoppedError: the run is to stop, and they are not announced or not held yet.
        """
        self.reporter.status(f"publishing version {version}")
        phase = self.summary.phase
        with phase("publish" if wait else "snapshot"):
            begun = time.monotonic()
            dtype = DTYPES[self.settings.fleet.dtype]
            tensors = await asyncio.to_thread(state_tensors, self.learner.policy, dtype)
            snapshot_s = time.monotonic() - begun
            if wait:
                head = await self.stop.unless(
                    self.to.publisher.publish(version, tensors, snapshot_s=snapshot_s),
                    grace_s=STOP_GRACE_S,
                )
            elif self.publication is not None:
                self.publication.start(version, tensors, snapshot_s)
        self.progress = replace(self.progress, version=version)
        if wait:
            with phase("wait for fleet"):
                holders = await self.stop.unless(self.to.patience.followed(head))
            if self.publication is not None:
                self.publication.held = version
            self.followed(head, holders)

    def followed(self, head: Head, holders: Sequence[ServerRecord]) -> None:
        """A version is held by the fleet: note who holds it, and let go of what nobody needs."""
        for record in holders:
            self.summary.versions[record.server_id] = record.version
        self.to.publisher.collect_soon(head.version)

    async def finish_step(self, done: int, share_before: float) -> None:
        """Checkpoint and measure where it is time to."""
        settings = self.settings
        last = done == settings.trainer.steps or self.share >= 1
        if last:
            await self.pipeline.close(Dropped.UNUSED)
        if last or self.saving.due(done):
            # Where trees grow meanwhile, training goes on.
            beside = "checkpoint" if self.pipeline.idle else "checkpoint beside rollouts"
            with self.summary.phase(beside):
                await self.saving.save(self.learner, self.replay, self.progress, last=last)
        every, points = settings.evaluation.every, settings.evaluation.points
        due = (every and done % every == 0) or int(points * self.share) > int(points * share_before)
        if due and not last:
            await self.measure("during")

    async def keep(self) -> None:
        """Make a checkpoint of the last step that was done, before the run ends early, where there is none yet."""
        step = self.progress.step
        if not step:
            return
        try:
            if not self.saving.has(step):
                self.reporter.status("writing a checkpoint")
                await self.saving.save(self.learner, self.replay, self.progress, last=True)
        except CheckpointError as error:  # what ends the run is to be said last
            self.reporter.say(str(error))
        else:
            self.reporter.say(f"step {step} is kept: `spoke train … --resume` goes on from it")

    async def measure(self, label: str) -> None:
        """As `_measure`, and given up where the run is to stop."""
        await self.stop.unless(self._measure(label))

    async def _measure(self, label: str) -> None:
        """Held-out accuracy of the policy as it stands, once its version is held and no tree is in flight.

        Both waits are training. Trees that grew on while nobody counts seconds would make training ahead of itself
        look quicker than it is, and take the servers from the measurement.
        """
        during, progress = label == "during", self.progress
        if self.publication is not None and label != "before":
            self.reporter.status("waiting for the fleet, before a measurement")
            with self.summary.phase("wait for fleet"):
                await self.publication.settled()
            # As in synchronous training, where a step ends once its version is held.
            progress = replace(progress, seconds=self.seconds)
            with self.summary.phase("rollout"):
                await self.pipeline.quiet()
        count = len(self.measuring.questions(during=during))
        self.reporter.status(f"measuring {count} held-out questions")
        with self.summary.phase("measure"):
            measurement = await self.measuring.measure(progress, during=during)
        self.summary.measurements.append(measurement)
        self.reporter.measured(label, measurement)
