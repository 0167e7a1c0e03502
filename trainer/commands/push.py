"""`spoke push MODEL_DIR`: a checkpoint becomes the next version of a run."""

import argparse
import asyncio

import torch
from rich.console import Console
from torch import Tensor

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError
from shared.fleet import Head, ServerRecord
from shared.fsspec_store import FsspecStore
from shared.store_url import check_announced
from trainer.commands.fleet import show
from trainer.fleet import wait_for_head
from trainer.lease import hold
from trainer.policy import DTYPES, load_policy, state_tensors
from trainer.publish import Publisher


def run(args: argparse.Namespace) -> int:
    """Publish, wait for the fleet, delete what nobody needs any more, print the table.

    Exit code 1 when a live server did not follow in time.
    """
    if args.keep_versions < 1:
        raise ConfigError(
            f"--keep-versions {args.keep_versions}: at least 1, the one that is pushed"
        )
    check_announced(args.advertise_store or args.store, "give --advertise-store its URL without")
    dtype = checkpoint_dtype(args.model) if args.dtype == "auto" else DTYPES[args.dtype]
    tensors = state_tensors(load_policy(args.model, dtype), dtype)
    head, records = asyncio.run(_push(args, tensors, str(dtype).removeprefix("torch.")))
    console = Console()
    console.print(f"version {head.version} is the head of run {args.run}", highlight=False)
    show(head, records, console)
    return 0 if all(head.held_by(record) for record in records) else 1


def checkpoint_dtype(model: str) -> torch.dtype:
    """The dtype that a checkpoint says it is in; float32 where it says none."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(model).dtype
    except (OSError, ValueError):
        return torch.float32  # loading the model gives the clear error
    return found if isinstance(found, torch.dtype) else torch.float32


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


async def _push(
    args: argparse.Namespace, tensors: dict[str, Tensor], dtype: str
) -> tuple[Head, list[ServerRecord]]:
    coordinator = RedisCoordinator(args.redis_url, args.run)
    try:
        store = FsspecStore(args.store, args.run)
        holding = hold(coordinator, store.versions, args.run, _say)
        async with holding as lease:
            publisher = Publisher(
                store=store,
                store_url=args.advertise_store or args.store,
                coordinator=coordinator,
                lease=lease,
                run=args.run,
                dtype=dtype,
                keep=args.keep_versions,
                wait_s=args.wait,
                status=_say,
            )
            head = await publisher.publish(await publisher.next_version(), tensors)
            await wait_for_head(coordinator, head, min_servers=0, timeout_s=args.wait)
            await publisher.collect(head.version)
        return head, await coordinator.servers()
    finally:
        await coordinator.close()
