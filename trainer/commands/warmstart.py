"""`spoke warmstart --out DIR`: make the checkpoint that the quickstart or the wordy comparison starts from."""

import argparse
from typing import Any

from trainer.problems import Wording
from trainer.warmstart import run as make
from trainer.warmstart import settings_for


def run(args: argparse.Namespace) -> int:
    """Train it; a line of progress at a time."""
    given: dict[str, Any] = {"steps": args.steps}
    own = {name: value for name, value in given.items() if value is not None}
    make(settings_for(Wording(args.wording), args.out, seed=args.seed, **own), print)
    return 0
