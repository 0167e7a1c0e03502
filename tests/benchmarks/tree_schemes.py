"""Which way of asking the engine for a tree is the quickest, and what priorities, seeds and alignment do to it.

Schemes, all on the same engine, in process, without HTTP and rewards, each tree's tokens the same number of nodes:

    ours      one request of n = k a node; a child branches when its own last token is there; deeper nodes first
    wait      the same, but children branch when the last of their siblings has ended
    single    k requests of n = 1 a node
    levels    all of a depth, then all of the next one
    flat      whole responses, no tree: the upper bound

and of ours: `no priority`, `seeded` (every sample its own stream) and `aligned` (branches where cache blocks end).
Rounds take the schemes in turn. Tokens per CPU second of the engine's own process are steadier than per second on
a machine with other work to do.

    python tests/benchmarks/tree_schemes.py [--engine vllm] [--rounds 5] [--trees 24] [--lengths vary|equal]
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

from tests.benchmarks.tree_speed import MODEL, Measured, engine_pids, timed  # noqa: E402


class Engine:
    """The engine under test, with what a scheme changes in every request.

    Args:
        engine: samples.
        change: makes a request another one.
    """

    def __init__(self, engine: Any, change: Callable[[Any], Any]) -> None:
        self._engine, self._change = engine, change
        self.info = engine.info

    async def generate(self, request: Any) -> Any:
        """Sample."""
        return await self._engine.generate(self._change(request))


class Waits(Engine):
    """Tells of samples only when the last of their siblings has ended."""

    async def generate(self, request: Any) -> Any:
        """Sample all, then tell of all."""
        result = await self._engine.generate(replace(request, on_completion=None))
        if request.on_completion is not None:
            for sample, completion in enumerate(result.completions):
                request.on_completion(sample, completion)
        return result


class Single(Engine):
    """Asks for each sample by itself."""

    async def generate(self, request: Any) -> Any:
        """k requests of one sample."""

        async def one(sample: int) -> Any:
            tell = request.on_completion
            asked = replace(
                request,
                samples=1,
                seed=request.seed + sample,
                on_completion=tell and (lambda _, done: tell(sample, done)),
            )
            return await self._engine.generate(asked)

        results = await asyncio.gather(*(one(sample) for sample in range(request.samples)))
        return replace(
            results[0],
            completions=[result.completions[0] for result in results],
            computed_prefill_tokens=sum(r.computed_prefill_tokens for r in results),
            cached_tokens=sum(r.cached_tokens for r in results),
        )


class Bench:
    """One engine and the stories to ask it about."""

    def __init__(self, engine: Any, tokens: Any, args: argparse.Namespace) -> None:
        from trainer.problems import Split, stories

        self.engine, self.tokens, self.args = engine, tokens, args
        self.computed = 0
        found = stories(Split.TRAIN, 11)
        self.prompts = [
            tuple(tokens.encode(next(found)["question"] + "\n")) for _ in range(args.trees * 8)
        ]

    def chosen(self, turn: int) -> list[tuple[int, ...]]:
        """A turn's prompts; a prefix that none has had, so that the cache is cold."""
        salt = self.tokens.encode(f"{random.getrandbits(60)} ")
        return [(*salt, *p) for p in random.Random(turn).sample(self.prompts, self.args.trees)]

    async def trees(
        self, turn: int, engine: Any, *, align: bool = False, seeded: bool = False
    ) -> int:
        """One tree for each of a turn's prompts; returns the sampled tokens."""
        from server.continuations import Continuations
        from server.sampler import sample
        from shared.wire import Sampling, TreePlan

        plan = TreePlan(
            branch_factors=[int(part) for part in self.args.plan.split("-")],
            segment_tokens=self.args.segment,
            align=align,
        )
        grown = [
            Continuations(
                engine=engine,
                tokens=self.tokens,
                prompt=prompt,
                sampling=Sampling(max_tokens=self.args.max_tokens),
                seed=random.getrandbits(60),
                reproducible=seeded,
            )
            for prompt in self.chosen(turn)
        ]
        await asyncio.gather(*(sample(plan, one) for one in grown))
        self.computed = sum(one.counts.computed_prefill for one in grown)
        return sum(one.counts.sampled for one in grown)

    async def levels(self, turn: int) -> int:
        """All of a depth, then all of the next one."""
        from server.engines.base import GenerateRequest

        factors = [int(part) for part in self.args.plan.split("-")]
        states = [(prompt, 0) for prompt in self.chosen(turn)]
        sampled = 0
        for depth, factor in enumerate(factors):
            last = depth == len(factors) - 1
            asked = [
                GenerateRequest(
                    prompt_token_ids=state,
                    samples=factor,
                    max_tokens=self.args.max_tokens - done if last else self.args.segment,
                    temperature=1.0,
                    seed=0,
                    reproducible=False,
                )
                for state, done in states
            ]
            results = await asyncio.gather(*(self.engine.generate(request) for request in asked))
            sampled += sum(len(c.token_ids) for r in results for c in r.completions)
            states = [
                ((*state, *c.token_ids), done + len(c.token_ids))
                for (state, done), result in zip(states, results, strict=True)
                for c in result.completions
                if c.finish_reason == "length"
            ]
        return sampled

    async def flat(self, turn: int, samples: int) -> int:
        """Whole responses."""
        from server.engines.base import GenerateRequest

        asked = [
            GenerateRequest(
                prompt_token_ids=prompt, samples=samples, max_tokens=self.args.max_tokens,
                temperature=1.0, seed=0, reproducible=False,
            )
            for prompt in self.chosen(turn)
        ]  # fmt: skip
        results = await asyncio.gather(*(self.engine.generate(request) for request in asked))
        return sum(len(c.token_ids) for r in results for c in r.completions)

    def schemes(self, samples: int) -> dict[str, Callable[[int], Awaitable[int]]]:
        """What is measured, by name."""
        same = Engine(self.engine, lambda request: request)
        flattened = Engine(self.engine, lambda request: replace(request, priority=0))
        return {
            "flat": lambda turn: self.flat(turn, samples),
            "ours": lambda turn: self.trees(turn, same),
            "ours, aligned": lambda turn: self.trees(turn, same, align=True),
            "ours, seeded": lambda turn: self.trees(turn, same, seeded=True),
            "ours, no priority": lambda turn: self.trees(turn, flattened),
            "wait": lambda turn: self.trees(turn, Waits(self.engine, lambda r: r)),
            "single": lambda turn: self.trees(turn, Single(self.engine, lambda r: r)),
            "levels": self.levels,
        }


async def main(args: argparse.Namespace) -> None:
    """Open the engine and measure."""
    from server.engines import EngineName, open_engine
    from server.engines.settings import EngineSettings
    from server.tokens import Tokens

    model = args.model
    settings = EngineSettings(model=str(model), dtype="float32", kv_cache_gib=args.kv_cache_gib)
    engine = await open_engine(EngineName(args.engine), settings)
    pids = engine_pids()
    bench = Bench(engine, Tokens.load(str(model)), args)
    tokens = await bench.trees(0, engine)
    length = await bench.flat(0, 8) / 8 / args.trees
    samples = max(1, round(tokens / args.trees / length))
    schemes = bench.schemes(samples)
    if args.only:
        chosen = {"flat", *args.only.split("|")}
        schemes = {name: run for name, run in schemes.items() if name in chosen}
    measured = {name: Measured() for name in schemes}
    computed: dict[str, int] = {}
    for turn in range(1, args.rounds + 1):
        order = list(schemes)
        random.Random(turn).shuffle(order)
        for name in order:
            bench.computed = 0
            measured[name].add(*await timed(pids, lambda n=name, t=turn: schemes[n](t)))
            computed[name] = bench.computed
        print(f"round {turn} of {args.rounds}", flush=True)
    await engine.close()
    rows = {}
    print(f"{args.engine}, {model.name}, {args.trees} trees of {args.plan}, segments of {args.segment}, "
          f"responses of {length:.0f}")  # fmt: skip
    print(
        f"{'scheme':20} {'tokens/s':>9} {'of flat':>8} {'engine us/token':>16} {'of flat':>8} {'service us':>11}"
    )
    for name, one in measured.items():
        rate, cpu = statistics.median(one.tokens_s), statistics.median(one.engine_us)
        of_flat = [a / b for a, b in zip(one.tokens_s, measured["flat"].tokens_s, strict=True)]
        cpu_of_flat = [
            b / a if a else 0.0
            for a, b in zip(one.engine_us, measured["flat"].engine_us, strict=True)
        ]
        rows[name] = {
            "tokens_s": rate, "of_flat": statistics.median(of_flat), "engine_us": cpu,
            "cpu_of_flat": statistics.median(cpu_of_flat), "computed_prefill": computed[name],
            "service_us": statistics.median(one.service_us),
        }  # fmt: skip
        print(f"{name:20} {rate:9,.0f} {rows[name]['of_flat']:8.2f} {cpu:16.0f} "
              f"{rows[name]['cpu_of_flat']:8.2f} {rows[name]['service_us']:11.0f}")  # fmt: skip
    print(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, "schemes": rows}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("--model", type=Path, default=MODEL)
    parse.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parse.add_argument("--kv-cache-gib", type=float, default=1.0)
    parse.add_argument("--plan", default="6-6-6")
    parse.add_argument("--segment", type=int, default=32)
    parse.add_argument("--max-tokens", type=int, default=128)
    parse.add_argument("--trees", type=int, default=24)
    parse.add_argument("--rounds", type=int, default=5)
    parse.add_argument("--only", default="", help="schemes beside flat, with | between")
    return parse.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asyncio.run(main(arguments()))
