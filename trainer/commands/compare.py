"""`spoke compare CONFIG…`: several algorithms from one warm start on one budget, side by side."""

import argparse
import json
import shutil
from pathlib import Path

from rich.console import Console

from shared.errors import ConfigError
from trainer import compare
from trainer.compare import Curve, Run
from trainer.display import Display
from trainer.local import train_here


def run(args: argparse.Namespace) -> int:
    """Run what is missing, in turn; then write the table and the plot. Exit code 0 when all is there."""
    console = Console()
    out: Path = args.out
    runs = compare.plan(args.configs, _seeds(args.seeds), _overrides(args), _grid(args.grid))
    curves: list[Curve] = []
    for number, one in enumerate(runs, start=1):
        folder = out / one.name
        if compare.finished(one, folder):
            console.print(f"{number}/{len(runs)} {one.name}: done before", highlight=False)
        else:
            _train(one, folder, f"{number}/{len(runs)} {one.name}", console)
        curves.append(compare.read(one, folder))
        _write(curves, out)
    console.print(compare.markdown(curves), highlight=False, soft_wrap=True)
    console.print(f"table, plot and every run: {out}", highlight=False, soft_wrap=True)
    return 0


def _train(one: Run, folder: Path, title: str, console: Console) -> None:
    # What an interrupted run left is no result, and would stand in the way.
    shutil.rmtree(folder, ignore_errors=True)
    with Display(title, console) as display:
        train_here(one.settings, folder, display)
    for heavy in ("checkpoints", "weights"):
        shutil.rmtree(folder / heavy, ignore_errors=True)


def _write(curves: list[Curve], out: Path) -> None:
    """After every run, so that there is always something to look at."""
    (out / "comparison.json").write_text(json.dumps(compare.as_json(curves), indent=1))
    (out / "comparison.md").write_text(compare.markdown(curves))
    compare.plot(curves, out / "comparison.png")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: write whole numbers such as 0,1,2") from None


def _overrides(args: argparse.Namespace) -> list[str]:
    chosen = list(args.overrides)
    if args.tokens is not None:
        chosen += [f"trainer.budget_tokens={args.tokens}", "trainer.budget_seconds=null"]
    if args.seconds is not None:
        chosen += [f"trainer.budget_seconds={args.seconds}", "trainer.budget_tokens=null"]
    if args.points is not None:
        chosen += [f"evaluation.points={args.points}", "evaluation.every=0"]
    return chosen


def _grid(texts: list[str]) -> dict[str, list[str]]:
    grid = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (key and equals and values):
            raise ConfigError(f"--grid {text}: write KEY=VALUE,VALUE,…")
        grid[key] = values.split(",")
    return grid
