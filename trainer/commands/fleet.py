"""`spoke fleet`: the servers of a run."""

import argparse
import asyncio

from rich.console import Console
from rich.table import Table

from shared.coordination import RedisCoordinator
from shared.fleet import Head, ServerRecord
from shared.store_url import shown

PIPED_WIDTH = 200
"""Columns where no terminal sets them: nothing is folded for whoever reads a pipe."""


def run(args: argparse.Namespace) -> int:
    """Print the fleet table."""
    head, records = asyncio.run(_look(args.redis_url, args.run))
    console = Console()
    newest = "none announced" if head is None else f"{head.version} in {shown(head.store)}"
    console.print(f"run {args.run}: newest version {newest}", highlight=False, soft_wrap=True)
    show(head, records, console)
    return 0


async def _look(redis_url: str, run_name: str) -> tuple[Head | None, list[ServerRecord]]:
    coordinator = RedisCoordinator(redis_url, run_name)
    try:
        return await coordinator.head(), await coordinator.servers()
    finally:
        await coordinator.close()


def show(head: Head | None, records: list[ServerRecord], console: Console) -> None:
    """Print one row a live server, and below them what went wrong last, a line each."""
    if not records:
        console.print("no server is alive", highlight=False)
        return
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table(head, records))
    for record in records:
        if record.last_error:
            text = f"{record.server_id}: {record.last_error}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def table(head: Head | None, records: list[ServerRecord]) -> Table:
    """One row a live server."""
    made = Table()
    for column in ("server", "url", "state", "version", "behind", "trees", "tokens", "model"):
        wide = column in ("url", "model")
        made.add_column(column, no_wrap=not wide, overflow="fold" if wide else "ellipsis")
    for record in records:
        lags = head is not None and not head.held_by(record)
        made.add_row(
            record.server_id,
            record.url,
            str(record.state),
            f"[red]{held(head, record)}[/red]" if lags else held(head, record),
            behind(head, record),
            str(record.in_flight),
            f"{record.sampled_tokens:,}",
            f"{record.model} ({record.engine})",
        )
    return made


def held(head: Head | None, record: ServerRecord) -> str:
    """What a server samples with: a version, or the checkpoint that it started from."""
    return "checkpoint" if head is not None and not record.digest else str(record.version)


def behind(head: Head | None, record: ServerRecord) -> str:
    """How many versions a server is behind; nothing where that cannot be counted."""
    if head is None or not record.digest:
        return ""
    return str(max(0, head.version - record.version))
