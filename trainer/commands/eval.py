"""`spoke eval`: accuracy on a data set, sampled and graded by the servers."""

import argparse
import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import Progress

from shared.coordination import RedisCoordinator
from trainer.config import DataSettings, RewardSettings
from trainer.data import load
from trainer.evaluate import Accuracy, evaluate
from trainer.fleet import Fleet, fixed, registered


@contextlib.asynccontextmanager
async def fleet_of(args: argparse.Namespace, timeout_s: float) -> AsyncIterator[Fleet]:
    """The fleet that `--server` or `--run` names."""
    async with contextlib.AsyncExitStack() as stack:
        if args.server is not None:
            servers = fixed(args.server)
        else:
            coordinator = RedisCoordinator(args.redis_url, args.run)
            stack.push_async_callback(coordinator.close)
            await coordinator.ping()
            servers = registered(coordinator)
        fleet = Fleet(servers, timeout_s=timeout_s)
        stack.push_async_callback(fleet.close)
        yield fleet


def run(args: argparse.Namespace) -> int:
    """Evaluate and print one line."""
    accuracy = asyncio.run(_evaluate(args))
    Console().print(
        f"{args.data}: pass@1 {100 * accuracy.mean:.1f} % ± {100 * accuracy.standard_error:.1f} (standard error), "
        f"{accuracy.questions} questions x {accuracy.samples} samples at temperature {args.temperature:g}, "
        f"{accuracy.mean_tokens:.0f} tokens/answer, {100 * accuracy.unfinished:.1f} % unfinished, "
        f"weight version {accuracy.version}, {accuracy.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return 0


async def _evaluate(args: argparse.Namespace) -> Accuracy:
    questions = load(args.data)[: args.questions]
    data = DataSettings(
        train=args.data, heldout=args.data, prompt=args.prompt.replace("\\n", "\n"), chat=args.chat
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("questions", total=len(questions))
        async with fleet_of(args, args.timeout) as fleet:
            return await evaluate(
                fleet,
                questions,
                data=data,
                reward=RewardSettings(name=args.reward),
                samples=args.samples,
                temperature=args.temperature,
                max_tokens=args.max_tokens,
                name=f"eval/{secrets.token_hex(4)}",
                seed=args.seed,
                on_answer=lambda answer: progress.advance(task),
            )
