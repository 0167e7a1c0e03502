"""`spoke train CONFIG --run-dir DIR`: train against a fleet that runs already."""

import argparse
import asyncio
import time

from rich.console import Console

from trainer.config import load
from trainer.stopping import terminated_as_interrupted


def run(args: argparse.Namespace) -> int:
    """Train to the end, then print the tables."""
    settings = load(args.config, args.overrides)
    # Only now: torch takes seconds, and a mistake in the settings is to be known at once.
    from trainer.display import Display, show_summary
    from trainer.train import train

    console = Console()
    started = time.monotonic()
    display = Display(f"spoke train: {settings.run}", console)
    with terminated_as_interrupted(), display:
        summary = asyncio.run(
            train(settings, args.run_dir, display, resume=args.resume, signals=True)
        )
    summary.started = started
    show_summary(summary, console)
    return 0
