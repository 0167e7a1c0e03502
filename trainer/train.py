"""One training run from its settings to its summary: connected, loaded, put together for the loop."""

import asyncio
import contextlib
import json
import secrets
from pathlib import Path

from trainer import metrics
from trainer.config import TrainSettings
from trainer.data import Draw
from trainer.fleet import wait_for_servers
from trainer.loop import Trainer
from trainer.measuring import Measuring
from trainer.pipeline import Pipeline
from trainer.prepare import Connections, Start, begin, connect, open_folder, save_settings
from trainer.publication import Publication
from trainer.report import SUMMARY, Reporter, Summary, plot
from trainer.rollouts import Sampling
from trainer.saving import Saving
from trainer.stopping import Stop


async def train(
    settings: TrainSettings,
    folder: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    signals: bool = False,
) -> Summary:
    """Run a training run to its end.

    Args:
        settings: of the run.
        folder: takes metrics, checkpoints and the plot.
        reporter: shows progress.
        resume: go on from the newest checkpoint in `folder`.
        signals: SIGINT and SIGTERM stop it with a checkpoint: for a program's main thread, one run at a time.

    Raises:
        ConfigError: something that the user gave cannot be used.
        CoordinationError: Redis is away, another trainer holds the run, or the fleet does not follow in time.
        CheckpointError: the last checkpoint cannot be written.
        StoppedError: such a signal came; see `Trainer.run`.
    """
    open_folder(folder, resume=resume)
    async with connect(settings, folder, reporter.say) as to:
        save_settings(settings, folder)
        with metrics.MetricsLog(folder) as log:
            reporter.status("loading data and model")
            # In a thread, as everything that takes long: the lease is renewed meanwhile.
            start = await asyncio.to_thread(begin, settings, folder, resume=resume)
            if resume:
                reporter.say(f"going on after step {start.progress.step}")
            reporter.status("waiting for servers")
            fleet = settings.fleet
            await wait_for_servers(to.coordinator, fleet.min_servers, fleet.wait_s, reporter.say)
            earlier = start.progress.version if start.progress.step else -1
            version = await to.publisher.next_version(earlier)
            trainer = assemble(settings, folder, reporter, to, log, start, version)
            try:
                with trainer.stop.listening(reporter.say) if signals else contextlib.nullcontext():
                    summary = await trainer.run()
            finally:
                if trainer.publication is not None:
                    await trainer.publication.close()
    plot(summary, folder / "learning_curve.png")
    (folder / SUMMARY).write_text(json.dumps(summary.as_json(), indent=1))
    return summary


def assemble(
    settings: TrainSettings,
    folder: Path,
    reporter: Reporter,
    to: Connections,
    log: metrics.MetricsLog,
    start: Start,
    version: int,
) -> Trainer:
    """A trainer whose first version gets this number."""
    ahead, session = settings.fleet.max_staleness, secrets.token_hex(4)
    publication = Publication(to.publisher, to.patience) if ahead else None
    draw = Draw(start.questions, settings.rollout.questions, settings.seed)
    trainer = Trainer(
        settings=settings,
        learner=start.learner,
        replay=start.replay,
        to=to,
        publication=publication,
        pipeline=Pipeline(
            sampling=Sampling(
                settings=settings, fleet=to.fleet, draw=draw, session=session, ledger=start.ledger
            ),
            publication=publication,
            max_staleness=ahead,
            steps=settings.trainer.steps,
            first_step=start.progress.step,
            first_version=version,
        ),
        measuring=Measuring(
            settings=settings,
            fleet=to.fleet,
            heldout=start.heldout[: settings.evaluation.questions],
            session=session,
        ),
        saving=Saving(settings=settings, folder=folder, say=reporter.say),
        stop=Stop(),
        reporter=reporter,
        summary=Summary(run=settings.run, folder=folder, trees=start.ledger),
        log=log,
        progress=start.progress,
        earlier_seconds=start.progress.seconds,
    )
    if publication is not None:
        publication.followed = trainer.followed
    return trainer
