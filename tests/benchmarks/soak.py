"""A fleet through hundreds of versions and seeded random faults: does anybody ever serve wrong weights, or hang?

Three servers of the transformers engine on a tiny model in bfloat16, a trainer that publishes version after
version (`faults.publishing`), a real Redis, a store over HTTP, and clients that ask for small trees all the time.
At a version, with some probability, one of these happens:

    kill        kill -9 of a server at a random moment, and it starts again
    stop        SIGSTOP of a server for up to 8 s, longer than its record lives
    redis       Redis is killed and comes back empty up to 3 s later
    store       the store flips a bit, truncates, withholds, cuts off or stalls files of the version
    trainer     kill -9 of the trainer while it publishes; another one takes over
    clock       a process's clock jumps by a day, forwards or back

Every ready server is asked again and again for hashes of its live tensors, at rest and in the middle of it all,
and they are compared with what the trainer had in memory. Columns: how often each fault happened, and the seconds
from there until every server was ready with the newest version. "none" is a version without a fault, from when it
was ordered. Memory is that of the process that grew most in the second half of its life, of those that lived for
twenty versions or more.

    python tests/benchmarks/soak.py [--versions 200] [--faults 0.5] [--seed 0] [--servers 3]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import httpx  # noqa: E402  # after the path is set, as are all below
from faults.checking import check_tree  # noqa: E402
from faults.conftest import Run  # noqa: E402
from faults.parts import FaultyStore, Leader, Member  # noqa: E402
from support import running_redis  # noqa: E402

from shared.coordination import RedisCoordinator  # noqa: E402
from shared.errors import SpokeError  # noqa: E402
from shared.wire import Reward, RolloutTreeRequest, Sampling, TreePlan  # noqa: E402
from trainer.client import AsyncClient  # noqa: E402
from trainer.fleet import registered  # noqa: E402

BOUND_S = 120.0
"""Whatever happens, it is over after this."""
KINDS = ("kill", "stop", "redis", "store", "trainer", "clock")
LIES = ("flip", "truncate", "missing", "cut", "stall")
MODEL = ROOT.parent / "shared" / "models" / "tiny_math"


class Soak:
    """The fleet, what is done to it, and what became of it."""

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        self.run, self.rng, self.args = run, random.Random(args.seed), args
        self.store = FaultyStore(run.folder / "store")
        self.url = run.stack.enter_context(self.store.serving())
        self.clocks = run.folder / "clocks"
        self.clocks.mkdir()
        self.members = [self.member(f"server-{n}") for n in range(args.servers)]
        self.leaders = [self.leader()]
        self.newest = -1
        self.tasks: set[asyncio.Task[Any]] = set()
        self.counts: Counter[str] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.wrong: list[str] = []
        self.memory: dict[int, list[int]] = defaultdict(list)
        """Process id -> KiB at each version."""

    def member(self, name: str) -> Member:
        kept = str(self.run.folder / f"kept-{name}")
        return self.run.member(name, "--weights-dir", kept, faults="clock")

    def leader(self) -> Leader:
        return self.run.leader(
            "--store-url", self.url, "--max-staleness", "3", "--skew", str(self.clocks)
        )

    def expected(self, version: int) -> dict[str, str] | None:
        """Digests that the trainer had: of a number that a dead one began and another used, the later one's."""
        for leader in reversed(self.leaders):
            for line in list(leader.said):
                if line.get("begins") == version:
                    found: dict[str, str] = line["tensors"]
                    return found
        return None

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something in a while, beside everything else; the version is not over before."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            await asyncio.to_thread(act)

        self.tasks.add(asyncio.create_task(wait()))

    async def version(self) -> None:
        """One version from its order to rest, perhaps with a fault."""
        kind = self.rng.choice(KINDS) if self.rng.random() < self.args.faults else "none"
        begun = time.monotonic()
        if kind != "none":
            getattr(self, f"fault_{kind}")()
        if kind == "trainer":
            await self.overtaken()
        said = await asyncio.to_thread(self.leaders[-1].publish, BOUND_S)
        assert said["version"] > self.newest, "a version went back"
        self.newest = said["version"]
        await asyncio.gather(*self.tasks)
        self.tasks.clear()
        for member in self.members:
            await asyncio.to_thread(member.wait_version, self.newest, BOUND_S)
        self.counts[kind] += 1
        self.times[kind].append(time.monotonic() - begun)
        self.store.rules.clear()
        for member in self.members:
            await self.look(member)
        self.weigh()

    def fault_kill(self) -> None:
        member = self.rng.choice(self.members)

        def act() -> None:
            member.send(signal.SIGKILL)
            member.start()

        self.later(self.rng.uniform(0, 0.5), act)

    def fault_stop(self) -> None:
        member = self.rng.choice(self.members)
        self.later(self.rng.uniform(0, 0.3), lambda: member.send(signal.SIGSTOP))
        self.later(self.rng.uniform(1, 8), lambda: member.send(signal.SIGCONT))

    def fault_redis(self) -> None:
        self.run.redis.kill()
        self.later(self.rng.uniform(0.2, 3), self.run.redis.start)

    def fault_store(self) -> None:
        lie = self.rng.choice(LIES)
        self.counts[f"store: {lie}"] += 1
        self.store.release.clear()
        file = "manifest.json" if lie == "missing" else ""
        self.store.rule(rf"/v{self.newest + 1:06d}/{file}", lie, times=self.rng.randint(1, 3))
        self.later(self.rng.uniform(1, 4), self.store.release.set)

    def fault_trainer(self) -> None:
        self.leaders[-1].tell("publish")

    async def overtaken(self) -> None:
        """The trainer dies somewhere in the version that it was told to publish; the next one takes over."""
        await asyncio.sleep(self.rng.uniform(0, 0.1))
        self.leaders[-1].send(signal.SIGKILL)
        self.leaders.append(self.leader())

    def fault_clock(self) -> None:
        signs = self.rng.choice([self.clocks, *(member.signs for member in self.members)])
        offset = signs / "offset.new"
        offset.write_text(str(self.rng.choice((-86400.0, 0.0, 86400.0))))
        offset.replace(signs / "offset")

    async def watch(self) -> None:
        """Look at everybody for ever."""
        while True:
            for member in self.members:
                await self.look(member)
            await asyncio.sleep(0.2)

    async def look(self, member: Member) -> None:
        """Compare live tensors with the trainer's, where the server is ready."""
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(base_url=member.url, timeout=20) as http:
                if (await http.get("/readyz")).status_code != 200:
                    return
                answer = await http.get("/weights/live")
            if answer.status_code == 200:
                live = answer.json()
                self.counts["looks"] += 1
                right = live["tensors"] == self.expected(live["version"])
                unborn = (
                    self.newest < 0 and live["digest"] == ""
                )  # its checkpoint, before the run has a version
                if not unborn and not (right and live["digest"] == live["live_digest"]):
                    digest = live["digest"][:8] or "of its checkpoint"
                    self.wrong.append(
                        f"{member.name}: version {live['version']} {digest}, the newest is {self.newest}"
                    )

    async def ask(self, client: AsyncClient, numbers: Iterator[int]) -> None:
        """Small trees for ever, each compared with what was asked for."""
        for number in numbers:
            request = RolloutTreeRequest(
                request_id=f"tree-{number}",
                prompt=f"Ana has {number} apples. She buys 5 more. How many apples does Ana have now?\n",
                plan=TreePlan(branch_factors=[3, 2], segment_tokens=16),
                sampling=Sampling(max_tokens=48),
                reward=Reward(name="gsm8k", reference=str(number + 5)),
                min_weight_version=max(0, self.newest - 1),
            )
            self.counts["asked"] += 1
            try:
                tree = await client.rollout_tree(request)
            except SpokeError as error:
                self.counts["failed"] += 1
                print(f"tree {number}: {error}", flush=True)
                continue
            check_tree(tree, request)
            self.counts["answered"] += 1
            self.counts["given"] += tree.usage.given_tokens > 0
            self.counts["mixed"] += tree.weight_versions.min < tree.weight_versions.max
            await asyncio.sleep(0.05)

    async def soak(self) -> None:
        """All versions, with load and looks beside them; what fails there fails here."""
        coordinator = RedisCoordinator(self.run.redis.url, self.run.name)
        client = AsyncClient(
            registered(coordinator), timeout_s=BOUND_S, affinity_slack=0, keep_nodes=True
        )
        numbers = itertools.count()
        beside = [asyncio.create_task(self.ask(client, numbers)) for _ in range(self.args.clients)]
        beside.append(asyncio.create_task(self.watch()))
        try:
            for done in range(1, self.args.versions + 1):
                versions = asyncio.create_task(self.version())
                await asyncio.wait({versions, *beside}, return_when=asyncio.FIRST_COMPLETED)
                for task in beside:
                    if task.done():
                        task.result()
                await versions
                if done % 20 == 0:
                    print(f"{done} versions, {len(self.wrong)} wrong", flush=True)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await client.close()
            await coordinator.close()

    def weigh(self) -> None:
        """Note how much memory each process has."""
        for process in [self.leaders[-1].process, *(member.process for member in self.members)]:
            status = Path(f"/proc/{process.pid}/status").read_text()
            self.memory[process.pid].append(int(status.split("VmRSS:")[1].split()[0]))

    def growth(self) -> dict[str, float]:
        """Of the process that grew most in the second half of its life, among those of twenty versions or more."""
        lives = [kib for kib in self.memory.values() if len(kib) >= 20]
        most = max(lives, key=lambda kib: kib[-1] - kib[len(kib) // 2], default=[0])
        return {
            "versions": len(most) - len(most) // 2,
            "first_mib": round(most[0] / 1024, 1),
            "middle_mib": round(most[len(most) // 2] / 1024, 1),
            "last_mib": round(most[-1] / 1024, 1),
        }


def row(name: str, seconds: list[float]) -> dict[str, Any]:
    """One line of the table."""
    ordered = sorted(seconds)
    return {
        "fault": name,
        "times": len(ordered),
        "median_s": round(statistics.median(ordered), 2),
        "p95_s": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "max_s": round(ordered[-1], 2),
    }


def main() -> None:
    """The benchmark."""
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("--versions", type=int, default=200)
    parse.add_argument("--faults", type=float, default=0.5, help="probability at each version")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--servers", type=int, default=3)
    parse.add_argument("--clients", type=int, default=2)
    args = parse.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.environ["TMPDIR"] = folder  # what killed processes leave behind goes with it
        redis = stack.enter_context(running_redis())
        soak = Soak(Run(folder=Path(folder), model=MODEL, redis=redis, stack=stack), args)
        asyncio.run(soak.soak())
    rows = [row(name, soak.times[name]) for name in ("none", *KINDS) if soak.times[name]]
    print(f"\n{'fault':<10}{'times':>7}{'median s':>10}{'p95 s':>8}{'max s':>8}")
    for one in rows:
        print(
            f"{one['fault']:<10}{one['times']:>7}{one['median_s']:>10}{one['p95_s']:>8}{one['max_s']:>8}"
        )
    counts = soak.counts
    print(
        f"\ntrees: {counts['asked']} asked, {counts['answered']} answered, {counts['failed']} failed, "
        f"{counts['given']} went on at another server, {counts['mixed']} with tokens of several versions\n"
        f"live tensors looked at {counts['looks']} times: {len(soak.wrong)} wrong {soak.wrong[:5]}\n"
        f"memory: {soak.growth()}"
    )
    result = {
        "versions": args.versions, "seed": args.seed, "servers": args.servers, "faults": rows,
        "counts": dict(counts), "wrong": len(soak.wrong), "memory": soak.growth(),
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    main()
