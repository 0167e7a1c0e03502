"""How many tokens the transformers engine samples per second, and where a decode step's time goes.

Trees of 4-2-2 with segments of 25 tokens are what the quickstart trains on; flat sampling of as many responses
shows what branching costs, and `model.generate` of transformers, given all prompts as one batch with as many
samples, what our cache and batching gain. Every contender runs on one thread; rounds alternate, so that a machine
with other work to do slows them all alike, and the median counts. Tokens per CPU second are what one core gives
when it has nothing else to do; tokens per second are what was left of it here.

    python tests/benchmarks/transformers_engine.py [--model DIR] [--rounds 5] [--max-batch 256]
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

from server.engines.base import GenerateRequest  # noqa: E402 - after the path
from server.engines.settings import EngineSettings  # noqa: E402 - after the path
from shared.tree import FinishReason  # noqa: E402 - after the path

TREES = 12
FACTORS = (4, 2, 2)
SEGMENT = 25
RESPONSE = 100
"""Most tokens of a response."""


def problems(count: int, seed: int) -> list[str]:
    """Stories like those that the model was trained on."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        thing = rng.choice(["apples", "coins", "books"])
        steps = rng.choices(
            ["buys {} more", "gives {} to Ben", "loses {}", "finds {} more"], k=rng.randint(4, 6)
        )
        told = " ".join(f"She {step.format(rng.randint(2, 12))}." for step in steps)
        lines.append(
            f"Ana has {rng.randint(20, 40)} {thing}. {told} How many {thing} does Ana have now?\n"
        )
    return lines


async def tree(engine: Any, prompt: tuple[int, ...], seed: int) -> int:
    """Sample one tree, each node as soon as its parent is there; returns the tokens sampled."""

    async def grow(path: tuple[int, ...], depth: int, done: int, seed: int) -> int:
        last = depth == len(FACTORS) - 1
        result = await engine.generate(
            GenerateRequest(
                prompt_token_ids=path,
                samples=FACTORS[depth],
                max_tokens=RESPONSE - done if last else SEGMENT,
                temperature=1.0,
                seed=seed,
            )
        )
        sampled = sum(len(c.token_ids) for c in result.completions)
        if last:
            return sampled
        below = [
            grow((*path, *c.token_ids), depth + 1, done + SEGMENT, (seed + i + 1) * 4096)
            for i, c in enumerate(result.completions)
            if c.finish_reason is FinishReason.LENGTH
        ]
        return sampled + sum(await asyncio.gather(*below))

    return await grow(prompt, 0, 0, seed)


async def flat(engine: Any, prompt: tuple[int, ...], samples: int, seed: int) -> int:
    """Sample whole responses of one prompt; returns the tokens sampled."""
    request = GenerateRequest(
        prompt_token_ids=prompt, samples=samples, max_tokens=RESPONSE, temperature=1.0, seed=seed
    )
    result = await engine.generate(request)
    return sum(len(c.token_ids) for c in result.completions)


def hugging_face(model: Any, tokenizer: Any, texts: list[str], samples: int) -> int:
    """The same responses by `model.generate`; returns the tokens sampled, padding not counted."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        num_return_sequences=samples,
        max_new_tokens=RESPONSE,
        top_k=0,
    )
    responses = output[:, batch["input_ids"].shape[1] :]
    end = model.generation_config.eos_token_id
    ended = (responses == end).cumsum(-1)
    return int(((ended == 0) | ((ended == 1) & (responses == end))).sum())


@dataclass
class Rates:
    """Tokens per second and per CPU second of this process, round by round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    async def take(self, contender: Awaitable[int]) -> None:
        """Run a contender, which gives the tokens that it sampled."""
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = await contender
        self.wall.append(tokens / (time.perf_counter() - wall))
        self.cpu.append(tokens / (time.process_time() - cpu))

    def medians(self) -> dict[str, int]:
        """Without the first round, which warms up."""
        return {
            "per_s": round(statistics.median(self.wall[1:])),
            "per_cpu_s": round(statistics.median(self.cpu[1:])),
        }


async def together(jobs: list[Awaitable[int]]) -> int:
    return sum(await asyncio.gather(*jobs))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders in turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from server.engines.transformers import open_engine

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    began = time.perf_counter()
    engine = await open_engine(
        EngineSettings(
            model=arguments.model, dtype="float32", device="cpu", max_batch=arguments.max_batch
        )
    )
    start_s = time.perf_counter() - began
    samples = math.prod(FACTORS)
    rates = {name: Rates() for name in ("tree", "flat", "generate")}
    spent: dict[str, float] = {}

    def prompts(seed: int) -> list[tuple[int, ...]]:
        return [tuple(tokenizer(text)["input_ids"]) for text in problems(TREES, seed)]

    for turn in range(arguments.rounds + 1):
        seeds = [(turn * TREES + i) * 2**32 for i in range(TREES)]
        before = await engine.times()
        jobs = [tree(engine, p, seed) for p, seed in zip(prompts(turn), seeds, strict=True)]
        await rates["tree"].take(together(jobs))
        after = await engine.times()
        for part in fields(after) if turn else ():
            spent.setdefault(part.name, 0)
            spent[part.name] += getattr(after, part.name) - getattr(before, part.name)
        # Prompts of their own, so that nothing is cached from the trees.
        others = zip(prompts(1000 + turn), seeds, strict=True)
        await rates["flat"].take(together([flat(engine, p, samples, seed) for p, seed in others]))
        job = asyncio.to_thread(hugging_face, model, tokenizer, problems(TREES, turn), samples)
        await rates["generate"].take(job)
    await engine.close()
    found = {name: rate.medians() for name, rate in rates.items()}
    return {"start_s": round(start_s, 2), **found, "tree_spent": spent}


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    print(f"{'tokens per':24}{'second':>10}{'CPU second':>12}")
    for name, text in (
        ("tree", f"trees of {'-'.join(map(str, FACTORS))}"),
        ("flat", "flat"),
        ("generate", "transformers generate"),
    ):
        print(f"{text:24}{result[name]['per_s']:>10,}{result[name]['per_cpu_s']:>12,}")
    spent = result["tree_spent"]
    parts = {name: seconds for name, seconds in spent.items() if name.endswith("_s")}
    print(f"\n{'trees':24}{'seconds':>10}{'share':>12}{'ms/step':>9}")
    for name, seconds in parts.items():
        share, per_step = seconds / sum(parts.values()), seconds / spent["steps"] * 1e3
        print(f"{name.removesuffix('_s'):24}{seconds:>10.3f}{share:>12.1%}{per_step:>9.2f}")
    print(f"{spent['steps']} steps of {spent['tokens'] / spent['steps']:.0f} rows on average\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT.parent / "shared/models/tiny_math"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-batch", type=int, default=256)
    result = asyncio.run(measure(parser.parse_args()))
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
