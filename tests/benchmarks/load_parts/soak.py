"""Rough minutes: what arrives is checked, and what is left behind is looked for."""

import asyncio
import contextlib
import math
import random
import statistics
import time
from itertools import islice
from queue import Empty
from typing import Any

import httpx

from tests.benchmarks.load_parts import mix
from tests.benchmarks.load_parts.bench import Bench
from tests.benchmarks.load_parts.checker import Answer, Checker, Findings, Setup
from tests.benchmarks.load_parts.clients import Clients, Manners, percentile
from tests.benchmarks.load_parts.watch import GAUGES, Sample, slope_mb_min

ROUGH = Manners(leave=0.1, leave_inside=0.1, slow=0.1, twice=0.1)
IDLE_CPU = 0.5
"""Most CPU of an idle server and its engine, in cores: one sequence that is left keeps a whole one busy."""
SLOWER = 3.0
"""Most times that a lone request may take afterwards of what it took before."""
GROWTH_MB_MIN = 5.0
"""Most growth of memory over the second half of a soak of five minutes or more."""


async def soak(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """Rough minutes at a multiple of the capacity, and what is left of them."""
    args, seconds = bench.args, 60 * bench.args.minutes
    rng = random.Random(args.seed)
    print(f"seed {args.seed}", flush=True)
    before = await bench.alone()
    count = math.ceil(args.times * bench.capacity(list(islice(mix.bodies(rng), 400))))
    with contextlib.closing(_checker(bench)) as checker:

        async def deliver(answer: Answer) -> None:
            await asyncio.to_thread(checker.put, answer)

        clients = Clients(bench.url, mix.bodies(rng), rng, ROUGH, deliver=deliver)
        watching = asyncio.create_task(_watched(bench, clients, seconds))
        print(f"{count} clients for {seconds:.0f} s", flush=True)
        try:
            await clients.run(count, seconds)
        finally:
            watching.cancel()
        took, last = await bench.settled()
        cpu = await bench.idle_cpu()
        samples: list[Sample] = await watching
        try:
            findings = await asyncio.to_thread(checker.finish, args.check_s)
        except Empty:
            findings = Findings(
                faults=[f"the checker did not end within {args.check_s} s"], wrong=1
            )
    after = await bench.alone()
    result = _soaked(bench, clients, samples, findings) | {
        "clients": count, "settled_s": took, "left": last.gauges(), "idle_cpu": cpu,
        "alone_s": [before, after], "tasks_after": last.metrics["tasks"], "fds_after": last.fds,
    }  # fmt: skip
    return result, clients.seen.faults + findings.faults + _left_behind(result)


def _checker(bench: Bench) -> Checker:
    args, limits = bench.args, bench.info["limits"]
    return Checker(
        Setup(
            model=args.model, context=limits["max_model_len"], share=args.compare, out=args.out,
            ends=frozenset(bench.info["eos_token_ids"]), seed=args.seed,
        )
    )  # fmt: skip


async def _watched(bench: Bench, clients: Clients, seconds: float) -> list[Sample]:
    """A look every ten seconds, a line every thirty, until cancelled."""
    samples: list[Sample] = []
    began, every = time.perf_counter(), min(10.0, seconds / 8)
    print(f"\n{'time':>6} {'answers':>8} {'429':>6} {'left':>5} {'faults':>6} {'trees':>6} {'line':>5} {'seqs':>6}"
          f" {'MB':>7} {'fds':>4} {'tasks':>6}", flush=True)  # fmt: skip
    with contextlib.suppress(asyncio.CancelledError):
        told = 0.0
        while True:
            at = time.perf_counter() - began
            try:
                sample = await bench.watch.look(at, bench.client)
            except (
                httpx.HTTPError,
                OSError,
            ) as error:  # the server is gone; the clients notice too
                clients.seen.faults.append(f"no metrics: {error!r}")
                return samples
            samples.append(sample)
            if at >= told:
                told += 30.0
                _line(sample, clients)
            await asyncio.sleep(every)
    return samples


def _line(sample: Sample, clients: Clients) -> None:
    seen, held = clients.seen, sample.metrics
    print(f"{sample.at_s:>5.0f}s {seen.statuses['200']:>8,} {seen.statuses['429']:>6,} "
          f"{seen.left + seen.left_inside:>5,} {len(seen.faults):>6} {held['trees_in_flight']:>6.0f} "
          f"{held['trees_waiting']:>5.0f} {held['engine_sequences']:>6,.0f} {sample.total_mb:>7,.0f} "
          f"{sample.fds:>4} {held['tasks']:>6.0f}", flush=True)  # fmt: skip


def _soaked(
    bench: Bench, clients: Clients, samples: list[Sample], findings: Findings
) -> dict[str, Any]:
    seen, pid = clients.seen, bench.server.process.pid
    seconds = [done.seconds for done in seen.done]
    slope = slope_mb_min(samples)
    return {
        "seconds": samples[-1].at_s if samples else 0.0,
        "statuses": dict(seen.statuses),
        "answers": len(seen.done),
        "disconnects": [seen.left, seen.left_inside],
        "slow_readers": seen.read_slowly,
        "twice": seen.twice,
        "gave_up": seen.gave_up,
        "p50_s": percentile(seconds, 0.5),
        "p95_s": percentile(seconds, 0.95),
        "p99_s": percentile(seconds, 0.99),
        "in_flight_mean": {n: statistics.fmean(s.metrics[n] for s in samples) for n in GAUGES},
        "rss_mb": [round(s.total_mb, 1) for s in samples],
        "rss_mb_min": {
            "all": slope,
            "by_process": {str(p): slope_mb_min(samples, p) for p in samples[-1].rss_mb},
            "server": slope_mb_min(samples, pid),
        },
        "fds": [s.fds for s in samples],
        "tasks": [s.metrics["tasks"] for s in samples],
        "trees": {n: v for n, v in samples[-1].metrics.items() if n.startswith("trees_total")},
        "checked": {
            "trees": findings.trees, "nodes": findings.nodes, "tokens": findings.tokens,
            "compared": findings.compared, "twins": findings.twins, "wrong": findings.wrong,
            "cpu_s": findings.cpu_s,
        },
    }  # fmt: skip


def _left_behind(result: dict[str, Any]) -> list[str]:
    """What a soak left that it must not."""
    found = []
    if any(result["left"].values()):
        found.append(f"{result['settled_s']:.1f} s after the last client: {result['left']}")
    if result["idle_cpu"] > IDLE_CPU:
        found.append(f"an idle server takes {result['idle_cpu']:.2f} cores")
    before, after = result["alone_s"]
    if after > SLOWER * before:
        found.append(f"a request alone takes {after:.3f} s, and took {before:.3f} s before")
    growth = result["rss_mb_min"]["all"]
    if result["seconds"] >= 290 and not growth <= GROWTH_MB_MIN:
        found.append(f"memory grows by {growth:.1f} MB a minute")
    if result["checked"]["trees"] != result["answers"]:
        found.append(f"{result['checked']['trees']} of {result['answers']} answers were trees")
    return found


def soak_table(result: dict[str, Any]) -> None:
    checked, growth = result["checked"], result["rss_mb_min"]
    rss = result["rss_mb"]
    rows = {
        "answers": f"{result['answers']:,} whole; by status {result['statuses']}",
        "seconds of a request": "p50 {p50_s:.1f}, p95 {p95_s:.1f}, p99 {p99_s:.1f}".format(
            **result
        ),
        "clients that left": "{} before the answer, {} inside it".format(*result["disconnects"]),
        "slow readers, pairs": f"{result['slow_readers']:,}, {result['twice']:,}",
        "trees": f"{checked['trees']:,} checked ({checked['nodes']:,} nodes, {checked['tokens']:,} tokens), "
        f"{checked['compared']} by a plain pass, {checked['twins']} pairs; {checked['wrong']} wrong",
        "memory": f"{rss[0]:,.0f} MB at first, {max(rss):,.0f} at most, {rss[-1]:,.0f} at last; second half "
        f"{growth['all']:+.2f} MB/min ({growth['server']:+.2f} the server itself)",
        "open files, tasks": f"{max(result['fds'])} at most, {result['fds_after']} after; "
        f"{max(result['tasks']):.0f} at most, {result['tasks_after']:.0f} after",
        "in flight afterwards": f"{result['left']} after {result['settled_s']:.1f} s",
        "idle server": f"{result['idle_cpu']:.2f} cores; one request alone "
        "{:.3f} s before, {:.3f} s after".format(*result["alone_s"]),
    }
    print()
    for name, text in rows.items():
        print(f"{name:>22}: {text}")
