"""What running ahead gains in time and costs in accuracy: the quickstart with several `max_staleness` in turns.

For each seed every n runs once, one run after the other on the same machine, each with two servers of its own: the
quickstart as it is, but measured before and after alone, since in a measurement in the middle trees of later steps
would be sampled for nothing. Columns, means over seeds with their standard deviation:

    seconds     of training: measurements and checkpoints not counted
    gain        seconds of the same seed with n = 0 over these, at the same number of steps
    waited      of these, for trees
    update      of these, in the optimizer updates
    publish     of these, until the weights were announced and held (n = 0), or copied (n > 0)
    accuracy    held-out pass@1 after training, sampled; the spread over seeds is what n = 1 must stay within
    greedy      held-out accuracy after training, greedy
    lag         versions that a trained token is older than the policy, mean
    limited     share of participating tokens whose weight was truncated or masked

    python tests/benchmarks/staleness.py [--seeds 0,1,2] [--staleness 0,1] [--steps 40] [--out DIR] [--set KEY=V]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOT_TRAINING = {"measure", "checkpoint"}
PUBLISH = {"publish", "wait for fleet", "snapshot"}
COLUMNS = ("seconds", "gain", "waited", "update", "publish", "accuracy", "greedy", "lag", "limited")


def run(seed: int, staleness: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, unless its folder has one already; its numbers."""
    if not (folder / "summary.json").exists():
        settings = [
            f"fleet.max_staleness={staleness}", "evaluation.every=0", f"launch.servers={args.servers}",
            *([] if args.steps is None else [f"trainer.steps={args.steps}"]), *args.overrides,
        ]  # fmt: skip
        command = [
            sys.executable, "-m", "trainer.cli", "quickstart", "--seed", str(seed), "--run-dir", str(folder),
            *(word for setting in settings for word in ("--set", setting)),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return numbers(seed, staleness, folder)


def numbers(seed: int, staleness: int, folder: Path) -> dict[str, Any]:
    """What a finished run's files say."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases, last = summary["seconds"], summary["measurements"][-1]
    return {
        "seed": seed,
        "n": staleness,
        "steps": summary["steps"],
        "seconds": sum(s for name, s in phases.items() if name not in NOT_TRAINING),
        "waited": phases["rollout"],
        "update": phases["update"],
        "publish": sum(s for name, s in phases.items() if name in PUBLISH),
        "before": summary["measurements"][0]["sampled"]["mean"],
        "accuracy": last["sampled"]["mean"],
        "error": last["sampled"]["standard_error"],
        "greedy": last["greedy"]["mean"] if last["greedy"] else None,
        "lag": fmean(line["staleness"]["mean"] for line in lines),
        "limited": fmean(line["limited"] for line in lines),
        "trees": summary["trees"],
    }


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    error = f" ± {stdev(known):.3f}" if len(known) > 1 else ""
    return f"{fmean(known):.3f}{error}"


def show(runs: Sequence[dict[str, Any]]) -> None:
    """The table, and one JSON line."""
    synchronous = {run["seed"]: run["seconds"] for run in runs if run["n"] == 0}
    for one in runs:
        base = synchronous.get(one["seed"])
        one["gain"] = None if base is None else base / one["seconds"]
    print("| n | runs | " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * (len(COLUMNS) + 2))
    for n in sorted({run["n"] for run in runs}):
        group = [run for run in runs if run["n"] == n]
        cells = [spread([run[column] for run in group]) for column in COLUMNS]
        print(f"| {n} | {len(group)} | " + " | ".join(cells) + " |")
    print(json.dumps({"benchmark": "staleness", "runs": runs}))


def main() -> None:
    """Run what is missing, then show all."""
    assert __doc__ is not None
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--seeds", default="0,1,2")
    parse.add_argument("--staleness", default="0,1", help="values of n (%(default)s)")
    parse.add_argument("--steps", type=int, default=None, help="default: the configuration's")
    parse.add_argument("--servers", type=int, default=2)
    parse.add_argument(
        "--out", type=Path, default=None, help="keeps the runs, and takes up again what is missing"
    )
    parse.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out, runs = args.out or Path(scratch), []
        for place, seed in enumerate(int(text) for text in args.seeds.split(",")):
            order = [int(text) for text in args.staleness.split(",")]
            # In turns: what warms up or slows down over the hours meets each of them.
            for n in order if place % 2 == 0 else reversed(order):
                runs.append(run(seed, n, args, out / f"seed-{seed}-n-{n}"))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        show(runs)


if __name__ == "__main__":
    main()
