"""`spoke`: parse first, import what the command needs after."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.errors import SpokeError
from shared.redis_url import VARIABLE, from_command_line
from trainer.stopping import StoppedError

REDIS_URL = "redis://127.0.0.1:6379/0"


def parser() -> argparse.ArgumentParser:
    """The command line of the trainer's side."""
    parse = argparse.ArgumentParser(
        prog="spoke", description="Segment Policy Optimization as a service: the trainer's side."
    )
    commands = parse.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train against a fleet"))
    _add_quickstart(
        commands.add_parser("quickstart", help="the whole loop on this machine, with its own fleet")
    )
    _add_compare(
        commands.add_parser("compare", help="several algorithms on one budget, table and plot")
    )
    _add_eval(commands.add_parser("eval", help="accuracy on a data set, through the servers"))
    _add_tree(commands.add_parser("tree", help="sample one tree and print it"))
    _add_inspect(commands.add_parser("inspect", help="what the trainer would do with a saved tree"))
    _add_fleet(
        commands.add_parser("fleet", help="the servers of a run, their versions, state and load")
    )
    _add_push(commands.add_parser("push", help="publish a checkpoint as the next version"))
    _add_store(commands.add_parser("store", help="serve a weight store's folder over HTTP"))
    _add_warmstart(commands.add_parser("warmstart", help="make the quickstart's first checkpoint"))
    return parse


def _add_overrides(parse: argparse.ArgumentParser) -> None:
    parse.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, such as trainer.learning_rate=1e-6; may be repeated",
    )  # fmt: skip


def _add_train(parse: argparse.ArgumentParser) -> None:
    parse.add_argument("config", type=Path, help="a TOML file, such as configs/quickstart.toml")
    parse.add_argument(
        "--run-dir", type=Path, required=True, help="takes metrics, checkpoints and plots"
    )
    parse.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --run-dir"
    )
    _add_overrides(parse)


def _add_quickstart(parse: argparse.ArgumentParser) -> None:
    parse.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parse.add_argument("--run-dir", type=Path, default=None, help="default: runs/NAME-DATE-TIME")
    parse.add_argument("--seed", type=int, default=None)
    _add_overrides(parse)


def _add_compare(parse: argparse.ArgumentParser) -> None:
    parse.add_argument(
        "configs", type=Path, nargs="+", metavar="CONFIG", help="TOML files, one an algorithm"
    )
    parse.add_argument(
        "--out", type=Path, required=True, help="takes every run, the table and the plot; what is there is kept"
    )  # fmt: skip
    parse.add_argument("--seeds", default="0,1,2", help="one run of each for each (%(default)s)")
    budget = parse.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=int, help="budget of a run: tokens sampled in training")
    budget.add_argument("--seconds", type=float, help="budget of a run: seconds of training")
    parse.add_argument("--points", type=int, help="measurements during a run")
    parse.add_argument(
        "--grid", action="append", default=[], metavar="KEY=V,V",
        help="run every configuration with each value, such as trainer.learning_rate=1e-4,2e-4; may be repeated",
    )  # fmt: skip
    _add_overrides(parse)


def _add_redis(parse: argparse.ArgumentParser, when: str = "") -> None:
    parse.add_argument(
        "--redis-url", default=None,
        help=f"{when}one with a password goes into {VARIABLE} (default: {VARIABLE}, else {REDIS_URL})",
    )  # fmt: skip


def _add_where(parse: argparse.ArgumentParser) -> None:
    where = parse.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="URL", help="one server, such as http://127.0.0.1:8000")
    where.add_argument("--run", metavar="NAME", help="the servers of a run, found in Redis")
    _add_redis(parse, "with --run; ")


def _add_sampling(
    parse: argparse.ArgumentParser, temperature: float, reward: str | None = "gsm8k"
) -> None:
    parse.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy (%(default)s)"
    )
    parse.add_argument("--max-tokens", type=int, default=1024, help="of a response (%(default)s)")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument(
        "--reward", default=reward,
        help=f"reward function of the server (default: {reward or 'that of the data set, else gsm8k'})",
    )  # fmt: skip


def _add_eval(parse: argparse.ArgumentParser) -> None:
    _add_where(parse)
    parse.add_argument(
        "--data", required=True, help="gsm8k, math500, FILE.jsonl, problems:heldout, hub:NAME:SPLIT"
    )
    parse.add_argument("--question-field", default=None, help="default: the data set's own")
    parse.add_argument("--answer-field", default=None, help="default: the data set's own")
    parse.add_argument(
        "--questions", type=int, default=None, help="the first so many; default: all"
    )
    parse.add_argument(
        "--samples", type=int, default=4, help="responses of each question (%(default)s)"
    )
    parse.add_argument(
        "--k", default=None, help="of pass@k and majority@k; default: 1,2,4,… up to --samples"
    )
    parse.add_argument(
        "--prompt", default=None, help="template with {question}; \\n is a newline; default: the data set's own"
    )  # fmt: skip
    parse.add_argument(
        "--chat", action="store_true", help="send the prompt through the chat template"
    )
    parse.add_argument(
        "--timeout", type=float, default=600.0, help="bound of one question, seconds"
    )
    parse.add_argument(
        "--out", type=Path, default=None, metavar="DIR",
        help="takes samples.jsonl and summary.json; default: runs/eval-DATA-DATE-TIME",
    )  # fmt: skip
    parse.add_argument(
        "--resume", action="store_true", help="go on with the samples that --out DIR has"
    )
    parse.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    _add_sampling(parse, 1.0, reward=None)


def _add_tree(parse: argparse.ArgumentParser) -> None:
    _add_where(parse)
    parse.add_argument("--prompt", required=True, help="\\n is a newline")
    parse.add_argument(
        "--chat", action="store_true", help="send the prompt through the chat template"
    )
    parse.add_argument("--branch-factors", default="4,2,2", help="children by depth (%(default)s)")
    parse.add_argument("--segment-tokens", type=int, default=25, help="(%(default)s)")
    parse.add_argument(
        "--reference", default=None, help="the right answer; without it there are no values"
    )
    parse.add_argument("--json", action="store_true", help="print the server's answer as it came")
    _add_sampling(parse, 1.0)


def _add_inspect(parse: argparse.ArgumentParser) -> None:
    parse.add_argument(
        "tree",
        metavar="TREE.json",
        help="what `spoke tree --json` printed, or nodes by hand; - is stdin",
    )
    parse.add_argument(
        "--config", type=Path, default=None, help="a training configuration; its [algorithm] counts"
    )
    parse.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="such as algorithm.advantage=normalised or algorithm.mask_threshold=null; may be repeated",
    )  # fmt: skip
    parse.add_argument("--json", action="store_true", help="print a list with an object a segment")
    parse.add_argument("--html", type=Path, default=None, metavar="FILE", help="write a page")
    parse.add_argument(
        "--tokenizer", default=None, metavar="DIR_OR_HUB_ID",
        help="tells tokens apart; default: the answer's model where it is a directory here",
    )  # fmt: skip


def _add_fleet(parse: argparse.ArgumentParser) -> None:
    _add_redis(parse)
    parse.add_argument("--run", required=True)


def _add_push(parse: argparse.ArgumentParser) -> None:
    parse.add_argument("model", metavar="MODEL_DIR", help="checkpoint in Hugging Face format")
    _add_redis(parse)
    parse.add_argument("--run", required=True)
    parse.add_argument("--store", required=True, help="weight store to write to, any fsspec URL")
    parse.add_argument(
        "--advertise-store", metavar="URL", default=None,
        help="its URL as servers reach it, such as that of `spoke store`; default: the same",
    )  # fmt: skip
    parse.add_argument(
        "--base", default=None, metavar="MODEL_DIR",
        help="the checkpoint that was pushed last: only what changed since is sent, unless that is much",
    )  # fmt: skip
    parse.add_argument(
        "--force",
        action="store_true",
        help="push even where tensors or shapes differ from the run's",
    )
    parse.add_argument(
        "--keep-versions", type=int, default=3, metavar="N",
        help="newest versions that stay in the store whatever the servers hold (default: 3)",
    )  # fmt: skip
    parse.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parse.add_argument(
        "--wait", type=float, default=300.0, help="bound of the wait for the fleet, seconds"
    )


def _add_store(parse: argparse.ArgumentParser) -> None:
    parse.add_argument(
        "root", type=Path, metavar="ROOT", help="folder with a folder for each run: `fleet.store`"
    )
    parse.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parse.add_argument("--port", type=int, default=8100, help="0 takes a free one (%(default)s)")
    parse.add_argument(
        "--auth", choices=["auto", "on", "off"], default="auto",
        help="ask for the bearer token of SPOKE_STORE_TOKEN: auto does where there is one, and refuses to listen "
        "beyond loopback without",
    )  # fmt: skip
    parse.add_argument(
        "--with-stdin", action="store_true", help="end when standard input ends, as a child process does"
    )  # fmt: skip


def _add_warmstart(parse: argparse.ArgumentParser) -> None:
    parse.add_argument("--out", type=Path, required=True, help="takes the checkpoint")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--steps", type=int, default=None)
    parse.add_argument(
        "--wording", choices=["fixed", "free"], default="fixed", help="of the chains of thought"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Exit codes: 0 done, 1 not all of it, 2 could not (one line says why), 130 interrupted,
    or told to stop.
    """
    args = parser().parse_args(arguments)
    # The libraries' own bars would write over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if "redis_url" in args:
            args.redis_url = (
                from_command_line(args.redis_url, "--redis-url", os.environ) or REDIS_URL
            )
        command = importlib.import_module(f"trainer.commands.{args.command}")
        code: int = command.run(args)
    except SpokeError as error:
        print(f"spoke {args.command}: {error}", file=sys.stderr)
        return 130 if isinstance(error, StoppedError) else 2
    except OSError as error:
        from shared.receiving import FULL

        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        then = "; the run goes on with --resume" if args.command == "train" else ""
        print(
            f"spoke {args.command}: {error.strerror}{where}; free some room{then}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"spoke {args.command}: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
