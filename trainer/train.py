"""The training loop, top to bottom: rollout, advantages, update, publish, measure.

    questions -> trees (fleet) -> segments with advantages -> optimizer updates -> version v+1 -> fleet -> …

Synchronous: the next rollout waits until every live server holds the weights of the last update, so every token
is sampled by the policy that the update starts from.
"""

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.coordination import Coordinator
from shared.errors import FleetError, RequestError
from shared.wire import RolloutTreeResponse
from trainer import checkpoints, metrics
from trainer.algorithms import Segment, advantages
from trainer.checkpoints import Progress
from trainer.config import TrainSettings
from trainer.data import Draw, Question
from trainer.evaluate import Accuracy, evaluate
from trainer.fleet import Fleet, wait_for_head, wait_for_servers
from trainer.packing import optimizer_batches
from trainer.policy import DTYPES, state_tensors
from trainer.prepare import build_learner, connect, open_folder, questions_of
from trainer.publish import Publisher
from trainer.report import Measurement, Reporter, Summary, plot
from trainer.requests import tree_request
from trainer.update import Learner, UpdateReport


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run in progress."""

    settings: TrainSettings
    learner: Learner
    fleet: Fleet
    coordinator: Coordinator
    publisher: Publisher
    draw: Draw
    heldout: list[Question]
    reporter: Reporter
    summary: Summary
    log: metrics.MetricsLog
    session: str
    """Part of every request id: a resumed run never gets the trees of the one before it."""
    progress: Progress

    async def run(self) -> Summary:
        """Train from where the run stands to its last step."""
        total = self.settings.trainer.steps
        self.reporter.status("publishing the first version")
        await self.publish(await self.publisher.next_version())
        await self.measure("before")
        for step in range(self.progress.step, total):
            values = await self.step(step)
            self.log.write(step + 1, values)
            self.reporter.step(step + 1, total, values)
            await self.finish_step(step + 1)
        await self.measure("after")
        return self.summary

    async def step(self, step: int) -> dict[str, Any]:
        """One iteration; returns its metrics."""
        before = dict(self.summary.seconds)
        with self.summary.phase("rollout"):
            trees, dropped = await self.rollout(step)
        with self.summary.phase("advantages"):
            segments = [s for tree in trees for s in advantages(tree, self.settings.algorithm)]
        with self.summary.phase("update"):
            # In a thread, so that the lease is renewed meanwhile.
            updates = await asyncio.to_thread(self.learn, segments, step)
        await self.publish(self.progress.version + 1)
        measured = metrics.of_trees(trees)
        self.progress = Progress(
            step=step + 1,
            version=self.progress.version,
            sampled_tokens=self.progress.sampled_tokens + measured["tokens"]["sampled"],
        )
        self.summary.steps = step + 1
        self.summary.rewards.append(measured["reward"]["mean"])
        self.summary.sampled_tokens = self.progress.sampled_tokens
        spent = {name: s - before.get(name, 0.0) for name, s in self.summary.seconds.items()}
        return {
            **measured,
            **metrics.of_segments(segments, trees),
            **metrics.of_updates(updates),
            "dropped_trees": dropped,
            "version": self.progress.version,
            "sampled_tokens_total": self.progress.sampled_tokens,
            "seconds": spent,
        }

    async def rollout(self, step: int) -> tuple[list[RolloutTreeResponse], dict[str, int]]:
        """One tree for each of the step's questions; (trees, trees dropped by reason).

        A question that the servers refuse is dropped and counted: it would be refused again.

        Raises:
            FleetError: a tree could not be had in time, or every question was refused.
        """
        self.reporter.status("rollout")
        answers = await asyncio.gather(*(self._tree(step, q) for q in self.draw.step(step)))
        trees = [answer for answer in answers if isinstance(answer, RolloutTreeResponse)]
        refusals = [answer for answer in answers if isinstance(answer, RequestError)]
        if not trees:
            raise FleetError(
                f"the servers refused every question of step {step + 1}; one says: {refusals[0]}"
            )
        dropped = Counter(refusal.field for refusal in refusals)
        for reason, count in dropped.items():
            self.summary.dropped[reason] = self.summary.dropped.get(reason, 0) + count
        return trees, dict(dropped)

    async def _tree(self, step: int, question: Question) -> RolloutTreeResponse | RequestError:
        settings = self.settings
        request = tree_request(
            question,
            data=settings.data,
            reward=settings.reward,
            plan=settings.rollout.plan,
            temperature=settings.rollout.temperature,
            max_tokens=settings.rollout.max_tokens,
            name=f"{settings.run}/{self.session}/step-{step}",
            seed=settings.seed * 1_000_003 + step,
            min_weight_version=self.progress.version,
        )
        try:
            return await self.fleet.rollout_tree(request)
        except RequestError as error:
            return error

    def learn(self, segments: Sequence[Segment], step: int) -> list[UpdateReport]:
        """The step's optimizer updates, each on its share of the trees."""
        self.reporter.status("update")
        settings = self.settings.trainer
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
        self.progress = Progress(
            step=self.progress.step, version=version, sampled_tokens=self.progress.sampled_tokens
        )
        await self.publisher.collect(version)

    async def finish_step(self, done: int) -> None:
        """Checkpoint and measure where it is time to."""
        settings = self.settings
        last = done == settings.trainer.steps
        every = settings.trainer.checkpoint_every
        if last or (every and done % every == 0):
            with self.summary.phase("checkpoint"):
                checkpoints.save(
                    self.summary.folder,
                    self.learner.policy,
                    settings.model.path,
                    self.learner.optimizer,
                    self.progress,
                )
        if settings.evaluation.every and done % settings.evaluation.every == 0 and not last:
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
            name=f"{self.settings.run}/{self.session}/eval-{self.progress.step}-{temperature}",
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
    async with connect(settings, folder) as (coordinator, publisher, fleet):
        with metrics.MetricsLog(folder) as log:
            reporter.status("loading data and model")
            checkpoint = checkpoints.newest(folder) if resume else None
            # In a thread, as everything that takes long: the lease is renewed meanwhile.
            questions, heldout = await asyncio.to_thread(questions_of, settings)
            learner, progress = await asyncio.to_thread(build_learner, settings, checkpoint)
            reporter.status("waiting for servers")
            await wait_for_servers(coordinator, settings.fleet.min_servers, settings.fleet.wait_s)
            trainer = Trainer(
                settings=settings,
                learner=learner,
                fleet=fleet,
                coordinator=coordinator,
                publisher=publisher,
                draw=Draw(questions, settings.rollout.questions, settings.seed),
                heldout=heldout[: settings.evaluation.questions],
                reporter=reporter,
                summary=Summary(run=settings.run, folder=folder),
                log=log,
                session=secrets.token_hex(4),
                progress=progress,
            )
            summary = await trainer.run()
    plot(summary, folder / "learning_curve.png")
    return summary
