"""`spoke fleet`: the servers of a run."""

import argparse
import asyncio

from rich.console import Console
from rich.table import Table

from shared.coordination import RedisCoordinator
from shared.fleet import Head, ServerRecord
from shared.store_url import shown


def run(args: argparse.Namespace) -> int:
    """Print the fleet table."""
    head, records = asyncio.run(_look(args.redis_url, args.run))
    console = Console()
    newest = "none announced" if head is None else f"{head.version} in {shown(head.store)}"
    console.print(f"run {args.run}: newest version {newest}", highlight=False, soft_wrap=True)
    console.print(table(head, records))
    return 0


async def _look(redis_url: str, run_name: str) -> tuple[Head | None, list[ServerRecord]]:
    coordinator = RedisCoordinator(redis_url, run_name)
    try:
        return await coordinator.head(), await coordinator.servers()
    finally:
        await coordinator.close()


def table(head: Head | None, records: list[ServerRecord]) -> Table:
    """One row a live server."""
    made = Table()
    for column in (
        "server",
        "url",
        "state",
        "version",
        "trees in flight",
        "tokens",
        "model",
        "last error",
    ):
        made.add_column(column)
    for record in records:
        behind = head is not None and not head.held_by(record)
        made.add_row(
            record.server_id,
            record.url,
            str(record.state),
            f"[red]{record.version}[/red]" if behind else str(record.version),
            str(record.in_flight),
            f"{record.sampled_tokens:,}",
            f"{record.model} ({record.engine})",
            record.last_error or "",
        )
    return made
