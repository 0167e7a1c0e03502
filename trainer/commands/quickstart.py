"""`spoke quickstart`: Redis, servers and trainer on this machine, from one command, ended with it."""

import argparse
from datetime import datetime
from pathlib import Path

from rich.console import Console

from trainer.config import load


def run(args: argparse.Namespace) -> int:
    """Start the fleet, train, print the tables, end the fleet."""
    seed = [] if args.seed is None else [f"seed={args.seed}"]
    settings = load(args.config, [*seed, *args.overrides])
    # Only now: torch takes seconds, and a mistake in the settings is to be known at once.
    from trainer.display import Display, show_summary
    from trainer.local import train_here

    console = Console()
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder: Path = args.run_dir or Path("runs") / f"{settings.run}-{stamp}"
    with Display(f"spoke quickstart: {settings.run}, seed {settings.seed}", console) as display:
        summary = train_here(settings, folder, display)
    show_summary(summary, console)
    return 0
