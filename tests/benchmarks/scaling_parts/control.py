"""What the fleet's table costs a real Redis: records written and read, one client, one connection."""

import asyncio
import time
from collections.abc import Sequence

from shared import coordination
from shared.coordination import RECORD_S, RedisCoordinator
from shared.fleet import ServerRecord, ServerState

REPORTS = 500
READS = 3
AT_ONCE = 100


def _record(number: int) -> ServerRecord:
    return ServerRecord(
        server_id=f"server-{number:06d}",
        url=f"http://server-{number:06d}.example:8000",
        state=ServerState.READY,
        version=1234,
        digest="d" * 64,
        model="Qwen/Qwen2.5-7B",
        engine="vllm",
        head=1234,
        serves_files=tuple(range(1225, 1235)),
        updated_at=1e9,
    )


async def table(url: str, fleets: Sequence[int]) -> list[list[str]]:
    """Rows for the page.

    Args:
        url: of a Redis that may be filled with a run named `scaling`.
        fleets: numbers of servers.
    """
    coordinator = RedisCoordinator(url, "scaling")
    coordination.RECORD_S = (
        600.0  # the first record must still live when one client has written the last
    )
    rows = [["servers", "records a second", "of what one client writes", "reading all", "bytes"]]
    try:
        for fleet in fleets:
            began = time.perf_counter()
            for number in range(REPORTS):
                await coordinator.report(_record(number % fleet))
            rate = REPORTS / (time.perf_counter() - began)
            for first in range(0, fleet, AT_ONCE):
                numbers = range(first, min(fleet, first + AT_ONCE))
                await asyncio.gather(*(coordinator.report(_record(number)) for number in numbers))
            began = time.perf_counter()
            for _ in range(READS):
                live = await coordinator.servers()
            each = (time.perf_counter() - began) / READS
            assert len(live) == fleet, "none has expired"
            needed = fleet * 3 / RECORD_S  # a record is renewed three times in its life
            size = sum(len(r.model_dump_json()) for r in live)
            rows.append(
                [f"{fleet:,}", f"{needed:,.0f}", f"{100 * needed / rate:.0f} %",
                 f"{1000 * each:.1f} ms", f"{size / 1e6:.2f} MB"]
            )  # fmt: skip
    finally:
        for number in range(max(fleets)):
            await coordinator.leave(_record(number).server_id)
        await coordinator.close()
    return rows
