"""What it gains to start a chain's rollouts while its responses still grow.

Chain requests with and without early rollouts take turns on one engine, alone (latency) and 16 at a time
(throughput). Rounds alternate, so that a machine with other work to do slows both alike, and the median of the
rounds' ratios counts. Both sample exactly the same tokens, which is checked. A group request with and without
anyone told of its tokens shows what the telling itself costs.

    python tests/benchmarks/chain_plan.py [--engine transformers] [--model DIR] [--rounds 7]
"""

import argparse
import asyncio
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

from server.chain import sample_chain  # noqa: E402 - after the path
from server.continuations import Continuations  # noqa: E402 - after the path
from server.engines.settings import EngineSettings  # noqa: E402 - after the path
from server.tokens import Tokens  # noqa: E402 - after the path
from shared.wire import ChainPlan, Sampling  # noqa: E402 - after the path

Run = Callable[[int, bool], Awaitable[int]]
"""(round, way) -> tokens sampled."""
STORY = (
    "Ana has {} apples. She buys {} more. She finds {} more. She loses {}. She gives {} to Ben. "
    "How many apples does Ana have now?\n"
)


@dataclass(frozen=True)
class Case:
    """One plan and how it is sampled."""

    name: str
    partition: dict[str, Any]
    value_rollouts: int
    temperature: float = 1.0
    max_tokens: int = 120


CASES = [
    Case("every cutpoint, N = 9", {"kind": "cutpoints", "interval": 1}, 9),
    Case("every 5th cutpoint, N = 9", {"kind": "cutpoints", "interval": 5}, 9),
    Case("every 16 tokens, N = 2", {"kind": "fixed", "tokens": 16}, 2),
    # Hot, the model hardly ever ends a response: long ones, of which nearly every token is a cutpoint.
    Case(
        "300 tokens, every 50th cutpoint, N = 4", {"kind": "cutpoints", "interval": 50}, 4, 2.0, 300
    ),
]
SAMPLES = 8


class Contest:
    """Two ways of sampling the same, on one engine.

    Args:
        engine: samples.
        tokens: the model's tokenizer.
    """

    def __init__(self, engine: Any, tokens: Tokens) -> None:
        self.engine, self.tokens = engine, tokens

    def continuations(self, seed: int, case: Case) -> Continuations:
        """Of a prompt that the seed decides."""
        numbers = [(seed * k) % 11 + 2 for k in (1, 3, 5, 7)]
        return Continuations(
            engine=self.engine,
            tokens=self.tokens,
            prompt=tuple(self.tokens.encode(STORY.format(30 + seed % 7, *numbers))),
            sampling=Sampling(temperature=case.temperature, max_tokens=case.max_tokens),
            seed=seed,
        )

    async def chain(self, case: Case, seeds: range, early: bool) -> int:
        """Chain requests, all at once; returns the tokens sampled."""
        plan = ChainPlan.model_validate(
            {
                "samples": SAMPLES,
                "partition": case.partition,
                "value_rollouts": case.value_rollouts,
            }
        )
        asked = [self.continuations(seed, case) for seed in seeds]
        await asyncio.gather(*(sample_chain(plan, one, early=early) for one in asked))
        return sum(one.counts.sampled for one in asked)

    async def group(self, case: Case, seeds: range, told: bool) -> int:
        """Group requests, all at once, with someone told of their tokens or nobody."""
        asked = [self.continuations(seed, case) for seed in seeds]
        news: list[Any] = []
        tell = news.append if told else None
        await asyncio.gather(*(o.after((), SAMPLES, seed=o.seed, on_news=tell) for o in asked))
        return sum(one.counts.sampled for one in asked)

    async def forget(self) -> None:
        """No prefix is left, so that the second way finds what the first one found."""
        if hasattr(self.engine, "_worker"):
            call = self.engine._worker.call(lambda batch: batch._store.clear())
            await asyncio.wrap_future(call)
        else:
            await self.engine._llm.reset_prefix_cache()

    async def compare(self, name: str, rounds: int, run: Run) -> dict[str, Any]:
        """Both ways in turn, round by round; the first round warms up."""
        wall: dict[bool, list[float]] = {False: [], True: []}
        cpu: dict[bool, list[float]] = {False: [], True: []}
        sampled = {False: 0, True: 0}
        for round_ in range(rounds + 1):
            for way in (False, True) if round_ % 2 else (True, False):
                await self.forget()
                began, began_cpu = time.perf_counter(), _cpu_s()
                sampled[way] = await run(round_, way)
                wall[way].append(time.perf_counter() - began)
                cpu[way].append(_cpu_s() - began_cpu)
            assert sampled[False] == sampled[True], "both ways sample the same"
        found: dict[str, Any] = {"name": name, "tokens": sampled[True]}
        for kind, took in (("wall", wall), ("cpu", cpu)):
            without, with_ = (statistics.median(took[way][1:]) for way in (False, True))
            ratios = [b / a for a, b in zip(took[False][1:], took[True][1:], strict=True)]
            low, middle, high = (round(q, 2) for q in statistics.quantiles(ratios, n=4))
            found[kind] = {"without_s": without, "with_s": with_, "ratio": [low, middle, high]}
        show(found)
        return found


def _cpu_s() -> float:
    """CPU seconds of this process, and of the one in which vLLM runs."""
    ticks = 0
    for child in multiprocessing.active_children():
        numbers = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(numbers[11]) + int(numbers[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def show(found: dict[str, Any]) -> None:
    """A line for people."""
    parts = []
    for kind in ("wall", "cpu"):
        low, middle, high = found[kind]["ratio"]
        took = f"{found[kind]['without_s']:7.3f} {found[kind]['with_s']:7.3f}"
        parts.append(f"{took}  {middle:4.2f} ({low:4.2f}-{high:4.2f})")
    print(f"{found['name']:<46} {parts[0]}  {parts[1]}  {found['tokens']:6d}", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--model", default=str(ROOT.parent / "shared/models/tiny_math"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    module = importlib.import_module(f"server.engines.{arguments.engine}")
    engine = await module.open_engine(
        EngineSettings(model=arguments.model, dtype="float32", kv_cache_gib=1.0)
    )
    contest = Contest(engine, Tokens.load(arguments.model))
    rows = []
    heads = [
        f"{kind + ' without':>15} {'with':>6}  ratio (quartiles)" for kind in ("wall s", "CPU s")
    ]
    print(f"{'':<38}{heads[0]:<30}{heads[1]:>40}  tokens")
    try:
        for at_once in arguments.at_once:
            for kind, case in [("chain", case) for case in CASES] + [("group", CASES[0])]:

                async def run(
                    round_: int, way: bool, kind: str = kind, case: Case = case, n: int = at_once
                ) -> int:
                    seeds = range(1000 + round_ * n, 1000 + (round_ + 1) * n)
                    return await (contest.chain if kind == "chain" else contest.group)(
                        case, seeds, way
                    )

                name = case.name if kind == "chain" else "group, told or not"
                rows.append(
                    await contest.compare(f"{name}, {at_once} at once", arguments.rounds, run)
                )
    finally:
        await engine.close()
    print(json.dumps({"engine": arguments.engine, "rounds": arguments.rounds, "rows": rows}))


if __name__ == "__main__":
    asyncio.run(main())
