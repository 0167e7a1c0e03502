"""Goodput of a server beyond its capacity."""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from shared.codec import MediaType, decode
from shared.wire import RolloutTreeResponse
from tests.benchmarks.load_parts import mix
from tests.benchmarks.load_parts.bench import Bench
from tests.benchmarks.load_parts.clients import Clients, Done, percentile

MULTIPLES = (0.5, 1.0, 2.0, 4.0)
TAIL_S = 60.0
"""Longest wait for the answers to what was sent in time."""


async def saturation(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """Goodput at each multiple of the capacity."""
    args, rng = bench.args, random.Random(3)
    questions = mix.questions(3)
    factors = [int(part) for part in args.plan.split("-")]
    plan = mix.tree(factors, args.segment)

    def bodies() -> Iterator[mix.Body]:
        while True:
            yield mix.plain_body(rng.choice(questions), plan)

    capacity = bench.capacity([mix.plain_body(questions[0], plan)])
    print(
        f"capacity: {capacity:.1f} trees {args.plan} of {args.segment} tokens at once", flush=True
    )
    levels: dict[float, list[dict[str, Any]]] = {multiple: [] for multiple in MULTIPLES}
    faults: list[str] = []
    for turn in range(args.rounds):
        for multiple in MULTIPLES if turn % 2 == 0 else reversed(MULTIPLES):
            clients = Clients(bench.url, bodies(), rng, media=(MediaType.MSGPACK,), keep=True)
            count, start = max(1, round(multiple * capacity)), time.perf_counter() + args.ramp
            watching = asyncio.create_task(_peak(bench, args.ramp + args.seconds))
            await clients.run(count, args.ramp + args.seconds, TAIL_S)
            seen, peak = clients.seen, await watching
            made = [
                (done, decode(done.body, MediaType.MSGPACK), start, start + args.seconds)
                for done in seen.done
            ]
            tokens = sum(_inside(*one) for one in made)
            inside = [one[0] for one in made if _inside(*one)]
            took, sample = await bench.settled()
            if any(sample.gauges().values()):
                faults.append(f"{took:.0f} s after {multiple}x: {sample.gauges()}")
            faults += seen.faults
            row = {
                "clients": count, "goodput": tokens / args.seconds, "answers": len(inside),
                "seconds": [done.seconds for done in inside], "statuses": dict(seen.statuses),
                "at_once": peak,
            }  # fmt: skip
            levels[multiple].append(row)
            print(f"  round {turn + 1}, {multiple:g}x: {row['goodput']:,.0f} tokens/s, {len(inside)} trees, "
                  f"{row['statuses']}, at most {row['at_once']:.0f} at once", flush=True)  # fmt: skip
    return _saturation_table(capacity, levels), faults


def _inside(done: Done, tree: RolloutTreeResponse, start: float, end: float) -> float:
    """Sampled tokens of a tree that fall into a window: trees end in waves, which a window would cut at random."""
    took = tree.timing.sample_s + tree.timing.reward_s
    overlap = min(done.ended, end) - max(done.ended - took, start)
    return tree.usage.sampled_tokens * max(0.0, overlap) / took


async def _peak(bench: Bench, seconds: float) -> float:
    """Most trees that held a place at once."""
    peak, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        peak = max(peak, (await bench.watch.look(0.0, bench.client)).metrics["trees_in_flight"])
        await asyncio.sleep(1.0)
    return peak


def _saturation_table(capacity: float, levels: dict[float, list[dict[str, Any]]]) -> dict[str, Any]:
    print(
        f"\n{'load':>5} {'clients':>8} {'goodput':>9} {'p50':>7} {'p95':>7} {'p99':>7} {'429':>6}"
    )
    rows: dict[str, Any] = {}
    for multiple, rounds in levels.items():
        seconds = [s for row in rounds for s in row["seconds"]]
        statuses = [row["statuses"] for row in rounds]
        total = sum(sum(s.values()) for s in statuses)
        row = {
            "clients": rounds[0]["clients"],
            "goodput": statistics.median(row["goodput"] for row in rounds),
            "rounds": [round(row["goodput"]) for row in rounds],
            "p50_s": percentile(seconds, 0.5),
            "p95_s": percentile(seconds, 0.95),
            "p99_s": percentile(seconds, 0.99),
            "busy_share": sum(s.get("429", 0) for s in statuses) / max(total, 1),
            "at_once": max(row["at_once"] for row in rounds),
        }
        rows[f"{multiple:g}"] = row
        print(f"{multiple:>4g}x {row['clients']:>8} {row['goodput']:>9,.0f} {row['p50_s']:>6.1f}s "
              f"{row['p95_s']:>6.1f}s {row['p99_s']:>6.1f}s {row['busy_share']:>6.1%}")  # fmt: skip
    best = max(row["goodput"] for row in rows.values())
    ratio = rows[f"{MULTIPLES[-1]:g}"]["goodput"] / best if best else 0.0
    print(f"goodput at {MULTIPLES[-1]:g} times the capacity: {ratio:.3f} of the best")
    return {"capacity": capacity, "levels": rows, "ratio": ratio}
