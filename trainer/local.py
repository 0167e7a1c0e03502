"""One training run with a fleet of its own on this machine."""

import asyncio
import time
from pathlib import Path

from trainer.config import TrainSettings
from trainer.display import Display
from trainer.launch import local_fleet
from trainer.report import Summary
from trainer.train import train


def train_here(settings: TrainSettings, folder: Path, display: Display) -> Summary:
    """Start Redis and the servers, train, end them.

    Args:
        settings: of the run; `fleet.redis_url` is replaced by that of the Redis which is started.
        folder: of the run; the processes' logs go to `logs` below it.
        display: shows progress.

    Raises:
        ConfigError, CoordinationError: see `local_fleet` and `train`.
    """
    display.status(f"starting Redis and {settings.launch.servers} servers")
    with local_fleet(settings.model.path, settings.run, settings.launch, folder / "logs") as local:
        if local.redis_kind == "fakeredis":
            display.say("no redis-server on the PATH: fakeredis' TCP server stands in for it")
        display.say(f"{local.redis_kind} at {local.redis_url}, {len(local.servers)} servers ready")
        fleet = settings.fleet.model_copy(update={"redis_url": local.redis_url})
        here: TrainSettings = settings.model_copy(update={"fleet": fleet})
        started = time.monotonic()
        summary = asyncio.run(train(here, folder, display, signals=True))
        summary.started = started
    return summary
