"""Publishing weights to 10 to 10,000 servers: seconds and bytes, from measured constants and a simulation.

`scaling_parts/costs.py` has the constants and says which of them are measured; `scaling_parts/swarm.py` simulates
who fetches from whom, event by event. Nothing here moves a byte, except that `--redis` asks a real Redis what the
fleet's table costs. `--page` writes the tables into docs/scaling.md between its markers.

    python tests/benchmarks/scaling.py [--page docs/scaling.md] [--redis redis://127.0.0.1:6379/0]
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

from tests.benchmarks.scaling_parts import control, costs  # noqa: E402 - after the path
from tests.benchmarks.scaling_parts.costs import FLEETS, LINKS, MODELS, Version  # noqa: E402
from tests.benchmarks.scaling_parts.show import Rows, duration, markdown, volume, write  # noqa: E402
from tests.benchmarks.scaling_parts.swarm import Link, Outcome, Setup, simulate  # noqa: E402

PART = 0.99
"""Of the live servers that must hold a version for it to count as published."""
NCCL = {"100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9, "8 x 400 Gbit/s": 400e9}
"""Bytes a second that a broadcast carries: line rates, of which NCCL reaches most. Not measured here."""
OWNERS = (1, 8, 64, 512)


@cache
def swarm(
    servers: int, size: float, ready_s: float, link: Link, slots: int = 2, failing: float = 0.0
) -> Outcome:
    """One simulated publish."""
    return simulate(
        Setup(servers=servers, size=size, ready_s=ready_s, link=link, slots=slots, failing=failing)
    )


def spread(version: Version, link: Link, servers: int) -> float:
    """Seconds until `PART` of a fleet has fetched and verified a version, peers helping."""
    return swarm(servers, version.size, version.verify_s, link).share(PART)


def bytes_table() -> Rows:
    rows = [["parameters", "full (bf16)", *costs.RATIOS, "encode", "decode"]]
    for name, parameters in MODELS.items():
        sizes = [costs.delta(parameters, rate).size for rate in costs.RATIOS]
        work = costs.delta(parameters)
        rows.append(
            [name, *map(volume, [work.full, *sizes]), duration(work.encode_s), duration(work.decode_s)]
        )  # fmt: skip
    return rows


def publish_table(link: Link, version_of: Callable[[float], Version]) -> Rows:
    """Each cell: everybody from the trainer, then with peers."""
    rows = [["parameters", *(f"{fleet:,} servers" for fleet in FLEETS)]]
    for name, parameters in MODELS.items():
        version = version_of(parameters)
        cells = [
            f"{duration(costs.from_origin(version, link, fleet))} → {duration(spread(version, link, fleet))}"
            for fleet in FLEETS
        ]
        rows.append([name, *cells])
    return rows


def shares_table(fleet: int = 1_000) -> Rows:
    rows = [["parameters", *(link.name for link in LINKS)]]
    for name, parameters in MODELS.items():
        small = costs.delta(parameters)
        cells = []
        for link in LINKS:
            parts = {
                "encode": small.encode_s,
                "network": spread(small, link, fleet),
                "decode": small.decode_s,
                "swap": costs.swap_s(small, parameters, costs.PLANNED),
            }
            total = sum(parts.values())
            largest = max(parts, key=lambda part: parts[part])
            cells.append(f"{duration(total)}: {largest} {100 * parts[largest] / total:.0f} %")
        rows.append([name, *cells])
    return rows


def uplink_table(parameters: float = 7e9) -> Rows:
    rows = [["servers", "copies out of the trainer", "delta", "anchor", "without peers: anchor"]]
    for fleet in (1, 2, 4, 8, *FLEETS):
        version = costs.delta(parameters)
        out = swarm(fleet, version.size, version.verify_s, LINKS[2])
        copies = out.origin_bytes / version.size
        full = costs.anchor(parameters).full
        rows.append(
            [f"{fleet:,}", f"{copies:.0f}", volume(out.origin_bytes), volume(copies * full), volume(fleet * full)]
        )  # fmt: skip
    return rows


def slots_table(fleet: int = 1_000, parameters: float = 7e9) -> Rows:
    rows = [["slots of a source", *(link.name for link in LINKS)]]
    version = costs.anchor(parameters)
    for slots in (1, 2, 3, 4, 8):
        outs = [swarm(fleet, version.size, version.verify_s, link, slots) for link in LINKS]
        rows.append([str(slots), *(duration(out.share(PART)) for out in outs)])
    return rows


def asking_table(fleet: int = 1_000) -> Rows:
    """A delta among peers, by how long a server waits that found no source free."""
    asks = (0.01, 0.05, 0.5, 2.0)
    rows = [["parameters, link", *(f"asks after {duration(ask)}" for ask in asks)]]
    for name, link in (("0.5B", LINKS[0]), ("7B", LINKS[0]), ("7B", LINKS[2])):
        size = costs.delta(MODELS[name]).size
        outs = [
            simulate(Setup(servers=fleet, size=size, link=link, ask_again_s=ask)).share(PART)
            for ask in asks
        ]
        rows.append([f"{name}, {link.name}", *map(duration, outs)])
    return rows


def slow_table(parameters: float = 7e9) -> Rows:
    """A delta among peers, by the share of servers with a tenth of the rates."""
    rows = [["slow servers", *(f"{fleet:,} servers: half, 99 %" for fleet in FLEETS[:3])]]
    version = costs.delta(parameters)
    for slow in (0.0, 0.05, 0.2):
        link, cells = replace(LINKS[2], slow=slow), []
        for fleet in FLEETS[:3]:
            out = swarm(fleet, version.size, version.verify_s, link)
            cells.append(", ".join(duration(out.share(part)) for part in (0.5, PART)))
        rows.append([f"{100 * slow:.0f} %", *cells])
    return rows


def failures_table(fleet: int = 1_000, parameters: float = 7e9) -> Rows:
    rows = [
        ["servers that fail", "delta: half", "99 %", "the last", "anchor: half", "99 %", "the last"]
    ]
    for failing in (0.0, 0.01, 0.05, 0.2):
        cells = []
        for version in (costs.delta(parameters), costs.anchor(parameters)):
            out = swarm(fleet, version.size, version.verify_s, LINKS[2], failing=failing)
            cells += [duration(out.share(part)) for part in (0.5, PART, 1.0)]
        rows.append([f"{100 * failing:.0f} %", *cells])
    return rows


def joiners_table(parameters: float = 7e9, fleet: int = 1_000) -> Rows:
    """Anchor and half the deltas after it, for some joiners of a fleet whose other servers hold them."""
    rows = [["joiners", *(link.name for link in LINKS)]]
    deltas = costs.ANCHOR_EVERY / 2
    size = costs.anchor(parameters).size + deltas * costs.delta(parameters).size
    for joiners in (1, 10, 100, 900):
        cells = []
        for link in LINKS:
            setup = Setup(servers=fleet, holders=fleet - joiners, size=size, link=link)
            work = (1 + deltas) * costs.delta(parameters).decode_s
            cells.append(duration(simulate(setup).share(PART) + work))
        rows.append([str(joiners), *cells])
    return rows


def shards_table() -> Rows:
    """What each owner of a part of the weights encodes and sends: two copies out, as the first slots take."""
    rows = [
        [
            "parameters",
            "owners",
            "bytes each: anchor",
            "delta",
            "encode",
            "anchor out, 100 Gbit/s",
            "1 Gbit/s",
        ]
    ]
    for name in ("70B", "405B", "1T"):
        for owners in OWNERS:
            full, small = costs.anchor(MODELS[name]), costs.delta(MODELS[name])
            part = full.size / owners
            rows.append(
                [name, str(owners), volume(part), volume(small.size / owners), duration(small.encode_s / owners),
                 *(duration(2 * part / rate) for rate in (LINKS[0].origin_up, LINKS[2].origin_up))]
            )  # fmt: skip
    return rows


def nccl_table() -> Rows:
    """Seconds from the announcement to sampling with a version, and seconds without sampling, of both ways."""
    link, rows = (
        LINKS[0],
        [
            [
                "parameters",
                "delta: latency",
                "pause",
                *(f"NCCL {n}" for n in NCCL),
                "NCCL is earlier from",
            ]
        ],
    )
    for name, parameters in MODELS.items():
        small = costs.delta(parameters)
        pause = costs.swap_s(small, parameters, costs.PLANNED)
        total = spread(small, link, 100) + small.decode_s + pause
        broadcast = [duration(costs.PAUSE + small.full / rate) for rate in NCCL.values()]
        even = 8 * small.full / (total - costs.PAUSE) / 1e9
        rows.append([name, duration(total), duration(pause), *broadcast, f"{even:.0f} Gbit/s"])
    return rows


def tables() -> dict[str, Rows]:
    """Every table by its marker in the page."""
    publish = {
        f"{kind}-{i}": publish_table(link, version_of)
        for i, link in enumerate(LINKS)
        for kind, version_of in (("delta", costs.delta), ("anchor", costs.anchor))
    }
    return {
        "bytes": bytes_table(),
        **publish,
        "shares": shares_table(),
        "uplink": uplink_table(),
        "slots": slots_table(),
        "asking": asking_table(),
        "slow": slow_table(),
        "failures": failures_table(),
        "joiners": joiners_table(),
        "shards": shards_table(),
        "nccl": nccl_table(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument(
        "--redis", help="URL of a Redis to time; its keys of the run `scaling` are overwritten"
    )
    args = parser.parse_args()
    found = tables()
    if args.redis:
        found["control"] = asyncio.run(control.table(args.redis, FLEETS))
    for name, rows in found.items():
        print(f"\n{name}\n{markdown(rows)}")
    if args.page:
        write(args.page, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
