"""Sampled tokens a second of trees through HTTP, rewards included, against the same engine's flat generation.

The real service (the app, admission, sampler, rewards) runs in this process on an engine whose flat batch
generation is measured through its own call beside it: the same model, the same run, in turns. The client is
another process that talks to a real socket and reads msgpack. "Flat" is the upper bound: whole responses to the
same prompts, about as many tokens, no branching, no HTTP, no rewards; in vLLM its own `AsyncLLM.generate`,
without our code.

`--plan` gives the tree; with `--concurrency` many trees at once the time of one request is shown for each.

    python tests/benchmarks/tree_speed.py [--engine vllm] [--repeats 5] [--trees 24] [--concurrency 1,8,64,512]
"""

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

from tests.benchmarks.http_load import Load, Outcome  # noqa: E402 - after the path

MODEL = ROOT.parent / "shared" / "models" / "tiny_math"


@dataclass
class Measured:
    """Rates of one contender, round by round."""

    tokens_s: list[float] = field(default_factory=list)
    service_us: list[float] = field(default_factory=list)
    """CPU microseconds of this process for a token."""
    engine_us: list[float] = field(default_factory=list)
    """The same of the engine's own process, where it has one."""

    def add(self, tokens: int, seconds: float, cpu: list[float]) -> None:
        """Note one round."""
        self.tokens_s.append(tokens / seconds)
        self.service_us.append(1e6 * cpu[0] / tokens)
        self.engine_us.append(1e6 * sum(cpu[1:]) / tokens)


def cpu_seconds(pids: list[int]) -> list[float]:
    """CPU time of each of some processes, user and system."""
    seconds = []
    for pid in pids:
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds.append((int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK"))
    return seconds


def engine_pids() -> list[int]:
    """This process and the engine's own, where it has one."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [own] + [pid for pid, line in names.items() if b"http_load" not in line]


async def client(load: Load) -> Outcome:
    """Run a client in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("http_load.py")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate(json.dumps(vars(load)).encode())
    assert process.returncode == 0, "the client failed"
    return Outcome(**json.loads(out))


@dataclass
class Bench:
    """One engine with the real service on a real socket around it."""

    engine: Any
    tokens: Any
    url: str
    rows: list[Any]
    pids: list[int]
    args: argparse.Namespace

    def body(self, number: int) -> dict[str, Any]:
        """The request of one tree."""
        row = self.rows[number % len(self.rows)]
        factors = [int(part) for part in self.args.plan.split("-")]
        seed = {"seed": number} if self.args.seeded else {}
        return {
            **self.prompt(row),
            "plan": {
                "kind": "tree",
                "branch_factors": factors,
                "segment_tokens": self.args.segment,
                "align": self.args.align,
            },
            "sampling": {"max_tokens": self.args.max_tokens, **seed},
            "reward": {"name": "gsm8k", "reference": row["answer"]},
            "return_text": False,
        }

    def prompt(self, row: Any) -> dict[str, Any]:
        """A question as a request says it; cut or repeated to `--prompt-tokens` where asked for."""
        if not self.args.prompt_tokens:
            return {"prompt": row["question"] + "\n"}
        return {"prompt_token_ids": self.ids(row)}

    def ids(self, row: Any) -> list[int]:
        """The same as token ids."""
        found: list[int] = self.tokens.encode(row["question"] + "\n")
        size = self.args.prompt_tokens or len(found)
        return (found * (size // len(found) + 1))[:size]

    async def trees(self, count: int, concurrency: int, first: int) -> Outcome:
        """Trees through HTTP."""
        bodies = [self.body(first + i) for i in range(count)]
        return await client(
            Load(url=self.url, bodies=bodies, concurrency=concurrency, accept=self.args.accept)
        )

    async def flat(self, tokens: int, first: int) -> int:
        """Whole responses to as many prompts, by the engine's own call; about as many tokens."""
        prompts = [
            self.ids(self.rows[(first + i) % len(self.rows)]) for i in range(self.args.trees)
        ]
        samples = max(1, round(tokens / len(prompts) / self.args.response))
        found = await asyncio.gather(*(self.own(prompt, samples) for prompt in prompts))
        return sum(found)

    async def own(self, prompt: list[int], samples: int) -> int:
        """One call of vLLM without our code, or of our transformers engine."""
        if self.args.engine == "transformers":
            from server.engines.base import GenerateRequest

            result = await self.engine.generate(
                GenerateRequest(
                    prompt_token_ids=tuple(prompt),
                    samples=samples,
                    max_tokens=self.args.max_tokens,
                    temperature=1.0,
                    seed=random.getrandbits(50),
                )
            )
            return sum(len(c.token_ids) for c in result.completions)
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=samples,
            max_tokens=self.args.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            stop_token_ids=list(self.engine.info.eos_token_ids),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        stream = self.engine._llm.generate(
            TokensPrompt(prompt_token_ids=prompt, cache_salt=uuid4().hex), params, uuid4().hex
        )
        async for output in stream:
            final = output
        return sum(len(c.token_ids) for c in final.outputs)


async def timed(
    pids: list[int], work: Callable[[], Awaitable[int]]
) -> tuple[int, float, list[float]]:
    """(tokens, seconds, CPU seconds of each process) of some work."""
    wall, before = time.perf_counter(), cpu_seconds(pids)
    tokens = await work()
    spent = [b - a for a, b in zip(before, cpu_seconds(pids), strict=True)]
    return tokens, time.perf_counter() - wall, spent


async def ratio(bench: Bench) -> dict[str, Any]:
    """Trees against flat, in turns."""
    args, trees, flat = bench.args, Measured(), Measured()
    warm = await bench.trees(4, 4, 10_000)
    length = await bench.own(bench.ids(bench.rows[0]), 64)
    args.response = length / 64  # mean tokens of a response
    tokens = warm.sampled_tokens * args.trees // 4
    for turn in range(args.repeats):

        async def through_http(turn: int = turn) -> int:
            done = await bench.trees(args.trees, args.trees, turn * args.trees)
            return done.sampled_tokens

        async def alone(turn: int = turn, tokens: int = tokens) -> int:
            return await bench.flat(tokens, turn * args.trees)

        order = [(trees, through_http), (flat, alone)]
        for contender, work in order if turn % 2 else reversed(order):
            contender.add(*await timed(bench.pids, work))
        print(f"  round {turn + 1}: trees {trees.tokens_s[-1]:,.0f}, flat {flat.tokens_s[-1]:,.0f} "
              f"tokens/s", flush=True)  # fmt: skip
    rounds = [a / b for a, b in zip(trees.tokens_s, flat.tokens_s, strict=True)]
    return {
        "trees_tokens_s": statistics.median(trees.tokens_s),
        "flat_tokens_s": statistics.median(flat.tokens_s),
        "ratio": statistics.median(trees.tokens_s) / statistics.median(flat.tokens_s),
        "median_of_rounds": statistics.median(rounds),
        "rounds": [round(r, 3) for r in rounds],
        "service_us": [statistics.median(trees.service_us), statistics.median(flat.service_us)],
        "engine_us": [statistics.median(trees.engine_us), statistics.median(flat.engine_us)],
        "mean_response": args.response,
    }


async def latency(bench: Bench, concurrency: int) -> dict[str, Any]:
    """Time of one request with so many at once."""
    count = max(bench.args.trees, min(2 * concurrency, 600))
    done = await bench.trees(count, concurrency, 20_000)
    times = sorted(done.seconds)
    return {
        "concurrent": concurrency,
        "trees": count,
        "tokens_s": done.sampled_tokens / done.wall_s,
        "p50_s": statistics.median(times),
        "p95_s": times[int(0.95 * (len(times) - 1))],
        "trees_s": len(times) / done.wall_s,
        "statuses": done.statuses,
    }


def endless(model: Path) -> Path:
    """A copy of a checkpoint without end tokens: every response has the same length."""
    copy = Path(tempfile.mkdtemp(prefix="spoke-endless-")) / model.name
    shutil.copytree(model, copy, copy_function=shutil.copy)
    for name in ("config.json", "generation_config.json"):
        (copy / name).chmod(0o644)
        settings = json.loads((copy / name).read_text())
        settings.pop("eos_token_id", None)
        (copy / name).write_text(json.dumps(settings))
    return copy


async def main(args: argparse.Namespace) -> None:
    """Open the engine, serve, measure."""
    import uvicorn

    from server.admission import Gate, capacity
    from server.app import Holder, create_app
    from server.costs import Cost
    from server.engines import EngineName, open_engine
    from server.engines.settings import EngineSettings
    from server.life import settle_heap
    from server.rewards.pool import RewardPool
    from server.service import RolloutService
    from server.states import Phase, Standing
    from server.status import Status
    from server.tokens import Tokens
    from trainer.problems import Split, stories

    if args.endless:
        args.model = endless(args.model)
    settings = EngineSettings(
        model=str(args.model), dtype=args.dtype, kv_cache_gib=args.kv_cache_gib,
        max_batch=args.max_batch,
    )  # fmt: skip
    engine = await open_engine(EngineName(args.engine), settings)
    pids = engine_pids()
    rewards = RewardPool({}, workers=1)
    await rewards.start(["gsm8k"])
    status = Status(server_id="bench", standing=Standing(phase=Phase.FOLLOWING))
    holder = Holder(status)
    big = Cost(nodes=1 << 20, tokens=1 << 30)
    holder.service = RolloutService(
        engine=engine, tokens=Tokens.load(str(args.model)), rewards=rewards, status=status,
        model="bench", gate=Gate(capacity(engine.info)), budget=big, metrics=holder.metrics,
    )  # fmt: skip
    settle_heap()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(holder), log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    found = stories(Split.TRAIN, 7)
    bench = Bench(
        engine=engine, tokens=holder.service.tokens, args=args, pids=pids,
        url=f"http://127.0.0.1:{listener.getsockname()[1]}", rows=[next(found) for _ in range(2000)],
    )  # fmt: skip
    print(f"{args.engine}, {args.model.name}, trees {args.plan} of {args.segment} tokens, "
          f"{args.trees} at once", flush=True)  # fmt: skip
    result: dict[str, Any] = {"plan": args.plan, "engine": args.engine}
    if args.repeats:
        result |= await ratio(bench)
        print(
            f"  ratio of medians {result['ratio']:.3f}, median of rounds {result['median_of_rounds']:.3f}"
        )
        for who in ("service", "engine"):
            of_trees, of_flat = result[f"{who}_us"]
            print(f"  CPU of the {who}: {of_trees:.0f} us a token (trees), {of_flat:.0f} (flat)")
    result["latency"] = []
    for concurrency in [int(part) for part in args.concurrency.split(",") if part]:
        row = await latency(bench, concurrency)
        result["latency"].append(row)
        print(f"  {concurrency:>4} at once: {row['p50_s']:.2f} s (median), {row['p95_s']:.2f} s (p95), "
              f"{row['tokens_s']:,.0f} tokens/s, {row['statuses']}", flush=True)  # fmt: skip
    server.should_exit = True
    await serving
    await rewards.close()
    await engine.close()
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("--model", type=Path, default=MODEL)
    parse.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parse.add_argument("--dtype", default="float32")
    parse.add_argument("--kv-cache-gib", type=float, default=1.0)
    parse.add_argument("--max-batch", type=int, default=256)
    parse.add_argument("--plan", default="6-6-6")
    parse.add_argument("--segment", type=int, default=30)
    parse.add_argument("--max-tokens", type=int, default=128)
    parse.add_argument("--trees", type=int, default=16)
    parse.add_argument("--repeats", type=int, default=5)
    parse.add_argument("--prompt-tokens", type=int, default=0, help="0: as the stories are")
    parse.add_argument("--endless", action="store_true", help="without end tokens")
    parse.add_argument("--align", action="store_true", help="branch where cache blocks end")
    parse.add_argument("--seeded", action="store_true", help="every tree reproducible")
    parse.add_argument("--accept", default="application/msgpack")
    parse.add_argument("--concurrency", default="", help="such as 1,8,64,512")
    return parse.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asyncio.run(main(arguments()))
