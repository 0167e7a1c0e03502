"""`spoke warmstart --out DIR`: make the checkpoint that the quickstart starts from."""

import argparse
from typing import Any

from trainer.warmstart import WarmstartSettings
from trainer.warmstart import run as make


def run(args: argparse.Namespace) -> int:
    """Train it; a line of progress at a time."""
    given: dict[str, Any] = {"steps": args.steps}
    own = {name: value for name, value in given.items() if value is not None}
    make(WarmstartSettings(out=args.out, seed=args.seed, **own), print)
    return 0
