"""How long new weights stop an engine: changed elements (a delta) against a full reload.

A randomly initialised Llama of SmolLM2-135M's shape (tied, bfloat16, 269 MB) takes weights, idle and with
sequences that decode. Deltas change a share of every tensor's elements, at random places: 0.4 % is what one AdamW
step at a learning rate of 1e-6 changes. `stage` is reading and checking, before the pause; `pause` is the time in
which nothing is sampled; `apply` is the writing within it. What running sequences wait besides, until their keys
and values are computed anew, is the same for all contenders, and not in vLLM's `pause`. Contenders take turns and
medians count, so that a machine with other work to do slows them all alike.

    python tests/benchmarks/weight_update.py [--engine vllm] [--rounds 7] [--sequences 8] [--layers 30]
"""

import argparse
import asyncio
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

from server.engines.base import ApplyReport, GenerateRequest, Weights  # noqa: E402 - after the path
from server.engines.settings import EngineSettings  # noqa: E402 - after the path

SHARES = (0.004, 0.01, 0.1)
PROMPT = tuple(range(5, 69))
PHASES = ("stage", "pause", "apply")
FULL = "full"


def parse() -> argparse.Namespace:
    """Arguments, before anything heavy is imported."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8, help="that decode in the busy half")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT.parent / "shared" / "models" / "tiny_math"
    )
    return parser.parse_args()


def make_model(folder: Path, layers: int, tokenizer: Path) -> None:
    """A checkpoint of SmolLM2-135M's shape, with any tokenizer of fewer tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


def make_updates(folder: Path) -> dict[str, tuple[Weights, ...]]:
    """By contender: the updates of one turn, which start and end at the same weights."""
    import torch
    from safetensors.torch import load_file, save_file

    old = load_file(folder / "model.safetensors")
    full = Weights(version=1, digest="old", files=(folder / "model.safetensors",))
    updates: dict[str, tuple[Weights, ...]] = {FULL: (full, full)}
    noise = torch.Generator().manual_seed(1)
    for share in SHARES:
        there: dict[str, torch.Tensor] = {}
        back: dict[str, torch.Tensor] = {}
        for name, tensor in old.items():
            places = (torch.rand(tensor.numel(), generator=noise) < share).nonzero().flatten().int()
            before = tensor.flatten()[places]
            for parts, values in ((there, before * 1.01), (back, before)):
                parts |= {f"{name}.indices": places, f"{name}.values": values}
        new = f"new-{share}"
        steps = (("old", new, there), (new, "old", back))
        updates[f"{share:.1%}"] = tuple(
            Weights(
                version=1,
                digest=after,
                base_digest=base,
                files=(folder / f"{after}-{share}.patch",),
            )
            for base, after, _ in steps
        )
        for _, after, parts in steps:
            save_file(parts, folder / f"{after}-{share}.patch")
    return updates


async def decode(engine: Any, sequences: int) -> None:
    """Keep sequences running for ever."""

    async def one(seed: int) -> None:
        while True:
            await engine.generate(
                GenerateRequest(
                    prompt_token_ids=PROMPT, samples=1, max_tokens=400, temperature=1.0, seed=seed
                )
            )

    await asyncio.gather(*(one(1000 * n) for n in range(sequences)))


async def measure(
    engine: Any, updates: dict[str, tuple[Weights, ...]], rounds: int
) -> dict[str, list[ApplyReport]]:
    """Rounds in which every contender has a turn; the first round warms up and does not count."""
    reports: dict[str, list[ApplyReport]] = {name: [] for name in updates}
    version = engine.version
    for number in range(rounds + 1):
        for name, turn in updates.items():
            for weights in turn:
                version += 1
                report = await engine.load_weights(replace(weights, version=version))
                await asyncio.sleep(0.1)  # running sequences decode again
                if number:
                    reports[name].append(report)
    return reports


def rows(load: str, reports: dict[str, list[ApplyReport]]) -> Iterator[dict[str, Any]]:
    """Medians in milliseconds."""
    for name, found in reports.items():
        medians = {p: 1e3 * statistics.median(getattr(r, f"{p}_s") for r in found) for p in PHASES}
        worst = 1e3 * max(r.pause_s for r in found)
        yield {"load": load, "update": name, "pause_max": worst} | medians


async def main() -> None:
    """Measure, print a table and one JSON line."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder, arguments.layers, arguments.tokenizer)
        updates = make_updates(folder)
        module = importlib.import_module(f"server.engines.{arguments.engine}")
        engine = await module.open_engine(
            EngineSettings(model=str(folder), dtype="bfloat16", seed=0, kv_cache_gib=0.5)
        )
        try:
            await engine.load_weights(updates[FULL][0])
            found = list(rows("idle", await measure(engine, updates, arguments.rounds)))
            running = asyncio.create_task(decode(engine, arguments.sequences))
            found += rows("busy", await measure(engine, updates, arguments.rounds))
            began = time.perf_counter()
            await engine.live_digests("bfloat16")
            digests_s = time.perf_counter() - began
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        finally:
            await engine.close()
    report(arguments, found, digests_s)


def report(arguments: argparse.Namespace, found: list[dict[str, Any]], digests_s: float) -> None:
    """The table, and the same as JSON."""
    print(f"\n{arguments.engine}, {arguments.rounds} rounds of 2; milliseconds, medians")
    print(
        f"{'load':5} {'update':>7} {'stage':>8} {'pause':>8} {'apply':>8} {'pause max':>10} {'full/this':>10}"
    )
    full = {row["load"]: row["pause"] for row in found if row["update"] == FULL}
    for row in found:
        row["shorter"] = full[row["load"]] / row["pause"]
        print(
            f"{row['load']:5} {row['update']:>7} {row['stage']:8.1f} {row['pause']:8.1f} {row['apply']:8.1f} "
            f"{row['pause_max']:10.1f} {row['shorter']:10.1f}"
        )
    print(f"digests of the live weights, busy: {digests_s:.2f} s")
    summary = {"benchmark": "weight_update", "engine": arguments.engine, "digests_s": digests_s}
    print(json.dumps(summary | {"rows": found}))


if __name__ == "__main__":
    asyncio.run(main())
