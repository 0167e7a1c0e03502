"""`spoke push MODEL_DIR`: a checkpoint becomes the next version of a run."""

import argparse
import asyncio

import torch
from rich.console import Console
from rich.filesize import decimal
from torch import Tensor

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError
from shared.fleet import Head, ServerRecord
from shared.fsspec_store import FsspecStore
from shared.store_url import check_announced
from trainer.base_version import as_published, check_fits
from trainer.commands.fleet import show
from trainer.fleet import wait_for_head
from trainer.lease import hold
from trainer.policy import DTYPES, load_policy, state_tensors
from trainer.publish import ENCODE_S, Publisher
from trainer.publish_report import PublishReport
from trainer.storing import asked, check_folder


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
    name = str(dtype).removeprefix("torch.")
    tensors = state_tensors(load_policy(args.model, dtype), dtype)
    base = None if args.base is None else state_tensors(load_policy(args.base, dtype), dtype)
    head, report, records = asyncio.run(_push(args, tensors, base, name))
    console = Console()
    console.print(
        f"version {head.version} is the head of run {args.run}: {sent(report)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    show(head, records, console)
    return 0 if all(head.held_by(record) for record in records) else 1


def sent(report: PublishReport) -> str:
    """What a server fetches that held the version before."""
    if report.delta_bytes is None:
        return f"all weights, {decimal(report.stored_bytes)}"
    return f"a delta of {decimal(report.delta_bytes)}"


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
    args: argparse.Namespace, tensors: dict[str, Tensor], base: dict[str, Tensor] | None, dtype: str
) -> tuple[Head, PublishReport, list[ServerRecord]]:
    coordinator = RedisCoordinator(args.redis_url, args.run)
    try:
        store = FsspecStore(args.store, args.run)
        check_folder(store, "--store")
        place = f"weight store {store.url}"
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
            before = await coordinator.head()
            if not args.force:
                await asked(place, args.wait, check_fits, before, tensors, store)
            if base is not None:
                bound = max(args.wait, ENCODE_S)  # every tensor is hashed
                publisher.start_from(
                    await asked(place, bound, as_published, before, base, dtype, store)
                )
            head = await publisher.publish(await publisher.next_version(), tensors)
            await wait_for_head(coordinator, head, min_servers=0, timeout_s=args.wait)
            await publisher.collect(head.version)
            [report] = publisher.reports()
        return head, report, await coordinator.servers()
    finally:
        await coordinator.close()
