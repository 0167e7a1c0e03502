"""`spoke quickstart`: Redis, servers and trainer on this machine, from one command, ended with it."""

import argparse
import asyncio
import time
from datetime import datetime
from pathlib import Path

from rich.console import Console

from trainer.config import TrainSettings, load
from trainer.display import Display, show_summary
from trainer.launch import local_fleet
from trainer.train import train


def run(args: argparse.Namespace) -> int:
    """Start the fleet, train, print the tables, end the fleet."""

    console = Console()
    seed = [] if args.seed is None else [f"seed={args.seed}"]
    settings = load(args.config, [*seed, *args.overrides])
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder: Path = args.run_dir or Path("runs") / f"{settings.run}-{stamp}"
    with Display(f"spoke quickstart: {settings.run}, seed {settings.seed}", console) as display:
        display.status(f"starting Redis and {settings.launch.servers} servers")
        with local_fleet(
            settings.model.path, settings.run, settings.launch, folder / "logs"
        ) as local:
            if local.redis_kind == "fakeredis":
                display.say("no redis-server on the PATH: fakeredis' TCP server stands in for it")
            display.say(
                f"{local.redis_kind} at {local.redis_url}, {len(local.servers)} servers ready"
            )
            fleet = settings.fleet.model_copy(update={"redis_url": local.redis_url})
            here: TrainSettings = settings.model_copy(update={"fleet": fleet})
            started = time.monotonic()
            summary = asyncio.run(train(here, folder, display))
            summary.started = started
    show_summary(summary, console)
    return 0
