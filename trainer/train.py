"""The training loop, top to bottom: rollout, advantages, update, publish, measure.

    questions -> trees (fleet) -> segments with advantages -> optimizer updates -> version v+1 -> fleet -> …

Synchronous: the next rollout waits until every live server holds the weights of the last update, so every token
is sampled by the policy that the update starts from.
"""

import asyncio
import json
import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.coordination import Coordinator
from shared.wire import RolloutTreeResponse
from trainer import checkpoints, metrics
from trainer.algorithms import Segment
from trainer.checkpoints import Progress
from trainer.config import TrainSettings
from trainer.data import Draw, Question
from trainer.evaluate import Accuracy, evaluate
from trainer.fleet import Fleet, wait_for_head, wait_for_servers
from trainer.packing import optimizer_batches
from trainer.policy import DTYPES, state_tensors
from trainer.prepare import build_learner, connect, open_folder, questions_of
from trainer.publish import Publisher
from trainer.replay import Replay
from trainer.report import SUMMARY, Measurement, Reporter, Summary, plot
from trainer.rollouts import Sampling, segments_of
from trainer.update import Learner, UpdateReport

NOT_TRAINING = frozenset({"measure", "checkpoint"})
"""Phases that no budget counts."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run in progress."""

    settings: TrainSettings
    learner: Learner
    replay: Replay | None
    fleet: Fleet
    coordinator: Coordinator
    publisher: Publisher
    sampling: Sampling
    heldout: list[Question]
    reporter: Reporter
    summary: Summary
    log: metrics.MetricsLog
    progress: Progress
    earlier_seconds: float = 0.0
    """Spent on training before this process resumed the run."""

    async def run(self) -> Summary:
        """Train from where the run stands to its last step, or to the end of its budget."""
        total = self.settings.trainer.steps
        self.reporter.status("publishing the first version")
        resumed = self.progress.version if self.progress.step else -1
        await self.publish(await self.publisher.next_version(resumed))
        await self.measure("before")
        for step in range(self.progress.step, total):
            if self.share >= 1:
                break
            before = self.share
            values = await self.step(step)
            self.log.write(step + 1, values)
            self.reporter.step(step + 1, total, values)
            await self.finish_step(step + 1, before)
        await self.measure("after")
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

    async def step(self, step: int) -> dict[str, Any]:
        """One iteration; returns its metrics."""
        before = dict(self.summary.seconds)
        with self.summary.phase("rollout"):
            self.reporter.status("rollout")
            rollout = await self.sampling.step(step, self.progress.version)
        with self.summary.phase("advantages"):
            fresh = await asyncio.to_thread(self.advantages, rollout.trees)
            segments = self.replayed(fresh, step)
        with self.summary.phase("update"):
            # In a thread, so that the lease is renewed meanwhile.
            updates = await asyncio.to_thread(self.learn, segments, step)
        await self.publish(self.progress.version + 1)
        sampled = metrics.of_trees(rollout.sampled)
        spent = {name: s - before.get(name, 0.0) for name, s in self.summary.seconds.items()}
        self.progress = replace(
            self.progress,
            step=step + 1,
            sampled_tokens=self.progress.sampled_tokens + sampled["tokens"]["sampled"],
            seconds=self.earlier_seconds + self.summary.seconds_of_training(NOT_TRAINING),
        )
        self.summary.add_step(sampled["reward"]["mean"], rollout.dropped, self.progress)
        return {
            **sampled,
            **metrics.of_segments(fresh, rollout.trees),
            **metrics.of_updates(updates),
            **metrics.of_replay(self.replay, segments),
            "replaced_trees": len(rollout.without_signal),
            "dropped_trees": rollout.dropped,
            "version": self.progress.version,
            "sampled_tokens_total": self.progress.sampled_tokens,
            "seconds": spent,
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
        reports = []
        for epoch in range(settings.epochs):
            rng = random.Random(f"{self.settings.seed}/{step}/{epoch}")
            for batch in optimizer_batches(segments, settings.updates_per_step, rng):
                reports.append(self.learner.update(batch))
        return reports

    async def publish(self, version: int) -> None:
        """Hand the weights to the fleet and wait until it holds them."""
        self.reporter.status(f"publishing version {version}")
        fleet = self.settings.fleet
        with self.summary.phase("publish"):
            tensors = state_tensors(self.learner.policy, DTYPES[fleet.dtype])
            head = await self.publisher.publish(version, tensors)
        with self.summary.phase("wait for fleet"):
            holders = await wait_for_head(
                self.coordinator, head, min_servers=fleet.min_servers, timeout_s=fleet.wait_s
            )
        for record in holders:
            self.summary.versions[record.server_id] = record.version
        self.progress = replace(self.progress, version=version)
        await self.publisher.collect(version)

    async def finish_step(self, done: int, share_before: float) -> None:
        """Checkpoint and measure where it is time to."""
        settings = self.settings
        last = done == settings.trainer.steps or self.share >= 1
        every = settings.trainer.checkpoint_every
        if last or (every and done % every == 0):
            with self.summary.phase("checkpoint"):
                checkpoints.save(
                    self.summary.folder,
                    self.learner,
                    settings.model.path,
                    self.replay,
                    self.progress,
                )
        every, points = settings.evaluation.every, settings.evaluation.points
        due = (every and done % every == 0) or int(points * self.share) > int(points * share_before)
        if due and not last:
            await self.measure("during")

    async def measure(self, label: str) -> None:
        """Held-out accuracy at the training temperature's own setting, and greedily before and after."""
        evaluation = self.settings.evaluation
        during = label == "during"
        questions = self.heldout[: evaluation.questions_during] if during else self.heldout
        self.reporter.status(f"measuring {len(questions)} held-out questions")
        with self.summary.phase("measure"):
            sampled = await self._accuracy(questions, evaluation.samples, evaluation.temperature)
            greedy = None
            if evaluation.greedy and not during:
                greedy = await self._accuracy(questions, 1, 0.0)
        measurement = Measurement(
            step=self.progress.step,
            sampled_tokens=self.progress.sampled_tokens,
            seconds=self.progress.seconds,
            sampled=sampled,
            greedy=greedy,
        )
        self.summary.measurements.append(measurement)
        self.reporter.measured(label, measurement)

    async def _accuracy(
        self, questions: Sequence[Question], samples: int, temperature: float
    ) -> Accuracy:
        return await evaluate(
            self.fleet,
            questions,
            data=self.settings.data,
            reward=self.settings.reward,
            samples=samples,
            temperature=temperature,
            max_tokens=self.settings.rollout.max_tokens,
            name=f"{self.settings.run}/{self.sampling.session}/eval-{self.progress.step}-{temperature}",
            # The same seed each time: measurements before and after differ by the weights alone.
            seed=self.settings.seed,
            min_weight_version=self.progress.version,
        )


async def train(
    settings: TrainSettings, folder: Path, reporter: Reporter, *, resume: bool = False
) -> Summary:
    """Run a training run to its end.

    Args:
        settings: of the run.
        folder: takes metrics, checkpoints and the plot.
        reporter: shows progress.
        resume: go on from the newest checkpoint in `folder`.

    Raises:
        ConfigError: something that the user gave cannot be used.
        CoordinationError: Redis is away, another trainer holds the run, or the fleet does not follow in time.
    """
    open_folder(settings, folder, resume=resume)
    async with connect(settings, folder, reporter.status) as (coordinator, publisher, fleet):
        with metrics.MetricsLog(folder) as log:
            reporter.status("loading data and model")
            checkpoint = checkpoints.newest(folder) if resume else None
            # In a thread, as everything that takes long: the lease is renewed meanwhile.
            questions, heldout = await asyncio.to_thread(questions_of, settings)
            learner = await asyncio.to_thread(build_learner, settings, checkpoint)
            replay = replay_of(settings)
            progress = Progress(step=0, version=0, sampled_tokens=0)
            if checkpoint is not None:
                progress = checkpoints.restore(checkpoint, learner, replay)
            reporter.status("waiting for servers")
            await wait_for_servers(coordinator, settings.fleet.min_servers, settings.fleet.wait_s)
            trainer = Trainer(
                settings=settings,
                learner=learner,
                replay=replay,
                fleet=fleet,
                coordinator=coordinator,
                publisher=publisher,
                sampling=Sampling(
                    settings=settings,
                    fleet=fleet,
                    draw=Draw(questions, settings.rollout.questions, settings.seed),
                    session=secrets.token_hex(4),
                ),
                heldout=heldout[: settings.evaluation.questions],
                reporter=reporter,
                summary=Summary(run=settings.run, folder=folder),
                log=log,
                progress=progress,
                earlier_seconds=progress.seconds,
            )
            summary = await trainer.run()
    plot(summary, folder / "learning_curve.png")
    (folder / SUMMARY).write_text(json.dumps(summary.as_json(), indent=1))
    return summary


def replay_of(settings: TrainSettings) -> Replay | None:
    """The run's replay, empty; None where it has none."""
    replay = settings.replay
    if not replay.enabled:
        return None
    return Replay(per_question=replay.per_question, max_age=replay.max_age, seed=settings.seed)
