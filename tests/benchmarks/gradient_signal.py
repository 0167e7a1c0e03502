"""How much of a batch's gradient is signal: plans and algorithms at an equal number of sampled tokens.

Which shape to train with (few questions and deep trees, or many questions and small groups) is decided by what one
batch's gradient g tells of its own mean:

    signal = |E g|^2 / tr Cov(g)        of a batch of `--batch-tokens` sampled tokens, rollouts for values included

and by the direction of that mean, for an estimator may be precise and wrong: `direction` is its cosine to the
gradient of the mean reward, as other plans' unmasked leave-one-out gradients estimate it. `expected` puts both
together: the cosine that one batch has to the gradient of the mean reward, on average.

Everything is real but the optimizer step: engine, sampler, reward, algorithms, packing, mask, whitening and policy
loss. A plan's trees are sampled once; its variants (mask, whitening, normalisation) see the same trees. The trees
fall into blocks of equally many questions. Inner products of different blocks' gradients estimate |E g|^2 without
bias, and errors are by leaving out one block at a time. Inner products are taken plainly, as SGD sees a gradient,
and with each parameter divided by the root mean square of its gradients in a pilot, as Adam sees it. Whitening
takes its mean and variance over all blocks at once. Results stay in `--out`; what is there is not measured again.

    python tests/benchmarks/gradient_signal.py --out DIR [--model DIR] [--operations 6] [SHAPE ...]
"""

import argparse
import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

import torch  # noqa: E402 - after the path

from server.answer import wire_nodes  # noqa: E402
from server.continuations import Continuations  # noqa: E402
from server.engines.settings import EngineSettings  # noqa: E402
from server.engines.transformers import open_engine  # noqa: E402
from server.grading import Grading  # noqa: E402
from server.rewards.gsm8k import gsm8k  # noqa: E402
from server.sampler import sample  # noqa: E402
from server.tokens import Tokens  # noqa: E402
from shared.tree import Role, RolloutTree  # noqa: E402
from shared.wire import Plan, Reward, RolloutTreeRequest, Sampling  # noqa: E402
from tests.benchmarks.signal_table import METRIC, keep, show, table  # noqa: E402
from tests.numerics.gradients import branching_weights  # noqa: E402
from tests.numerics.table_engine import Grades  # noqa: E402
from trainer.algorithms import AlgorithmSettings, advantages  # noqa: E402
from trainer.algorithms.base import negligible  # noqa: E402
from trainer.losses import policy_loss  # noqa: E402
from trainer.packing import Row, collate, micro_batches, rows  # noqa: E402
from trainer.policy import load_policy, score  # noqa: E402
from trainer.problems import Split, stories  # noqa: E402
from trainer.whiten import whiten_rows  # noqa: E402

MAX_TOKENS = 128
RHO = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is made of a plan's trees."""

    algorithm: str
    normalised: bool = False
    mask: bool = True
    whiten: bool = True
    even: bool = False
    """Weigh a tree's segments by one over the branch factors above them; see `branching_weights`."""

    @property
    def name(self) -> str:
        """Short, unique among a plan's variants."""
        flags = {
            "norm": self.normalised,
            "even": self.even,
            "mask": self.mask,
            "white": self.whiten,
        }
        return " ".join([self.algorithm, *(flag for flag, on in flags.items() if on)])


@dataclass(slots=True, kw_only=True)
class Measured:
    """One plan's blocks."""

    gradients: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """[blocks] of [P] summed over the block's tokens, by variant."""
    counts: dict[str, float] = field(default_factory=dict)


def variants(shape: str) -> list[Variant]:
    """The variants of a plan; the unmasked one that is not whitened estimates the reference."""
    kind = shape.split(":")[0]
    if kind == "group":
        return [
            Variant(algorithm="grpo"),
            Variant(algorithm="grpo", mask=False),
            Variant(algorithm="rloo", mask=False, whiten=False),
        ]
    if kind == "tree":
        return [
            Variant(algorithm="spo_tree"),
            Variant(algorithm="spo_tree", normalised=True),
            Variant(algorithm="spo_tree", whiten=False, even=True),
            Variant(algorithm="spo_tree", mask=False, whiten=False, even=True),
        ]
    name = "spo_chain" if kind == "cutpoints" else "vineppo"
    return [Variant(algorithm=name), Variant(algorithm=name, mask=False, whiten=False)]


def plan_of(shape: str) -> Any:
    """The plan of a name: group:8, tree:4-2-2:25, cutpoints:5:3 (interval, N), delimiter:3, fixed:15:3.

    A chain's name may end in :S for S responses to a question.
    """
    kind, *rest = shape.split(":")
    if kind == "group":
        raw: dict[str, Any] = {"kind": "group", "samples": int(rest[0])}
    elif kind == "tree":
        factors = [int(factor) for factor in rest[0].split("-")]
        raw = {"kind": "tree", "branch_factors": factors, "segment_tokens": int(rest[1])}
    else:
        partition: dict[str, Any] = {"kind": kind}
        if kind == "delimiter":
            partition["delimiter"] = "."
        else:
            partition["interval" if kind == "cutpoints" else "tokens"] = int(rest.pop(0))
        samples = int(rest[1]) if len(rest) > 1 else 1
        raw = {
            "kind": "chain",
            "samples": samples,
            "partition": partition,
            "value_rollouts": int(rest[0]),
        }
    request = {"prompt": "-", "plan": raw}
    plan: Plan = RolloutTreeRequest.model_validate(request).plan
    return plan


async def sampled(
    shape: str, arguments: argparse.Namespace, tokens: Tokens, name: str
) -> list[tuple[RolloutTree, int]]:
    """(tree, tokens sampled for it) until `--tokens` are sampled."""
    engine = await open_engine(
        EngineSettings(model=arguments.model, dtype="float32", device="cpu", max_batch=192)
    )
    # Other questions and streams for each plan: plans' gradients are compared, so they must be independent.
    text = f"{name} {arguments.seed}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=5).digest())
    questions = (
        row
        for row in stories(Split.TRAIN, seed)
        if not arguments.operations or row["answer"].count("=") == arguments.operations
    )

    rewards: Any = Grades(lambda text, reference: gsm8k(text, reference, {}))

    async def one(number: int, row: Any) -> tuple[RolloutTree, int]:
        prompt = tuple(tokens.encode(row["question"] + "\n"))
        continuations = Continuations(
            engine=engine,
            tokens=tokens,
            prompt=prompt,
            sampling=Sampling(temperature=1.0, max_tokens=MAX_TOKENS),
            seed=seed + number,
        )
        root = await sample(plan_of(shape), continuations)
        reward = Reward(name="gsm8k", reference=row["answer"])
        grading = Grading(tokens, rewards, reward)
        await grading.below(root)
        nodes = wire_nodes(root, prompt, grading.grades, None)
        return RolloutTree(request_id=str(number), nodes=nodes), continuations.counts.sampled

    trees: list[tuple[RolloutTree, int]] = []
    try:
        while sum(count for _, count in trees) < arguments.tokens:
            chunk = [one(len(trees) + i, next(questions)) for i in range(8)]
            trees += await asyncio.gather(*chunk)
    finally:
        await engine.close()
    return trees


def packed(trees: Sequence[RolloutTree], variant: Variant) -> list[Row]:
    """A variant's rows. Segments without advantage stay but take no part, so that all variants' rows align."""
    settings = AlgorithmSettings.model_validate(
        {
            "name": variant.algorithm,
            "advantage": "normalised" if variant.normalised else "difference",
            "drop_zero": False,
        }
    )
    made: list[Row] = []
    for tree in trees:
        segments = advantages(tree, settings)
        own = rows(segments, mask_threshold=RHO if variant.mask else None)
        if variant.even:
            weights = branching_weights(tree)
            # The weight rides along as the advantage of rows of the same layout.
            scaled = [replace(s, advantage=s.advantage * weights[s.node_id]) for s in segments]
            own = rows(scaled, mask_threshold=RHO if variant.mask else None)
        made += own
    made = [
        replace(row, participates=row.participates & (abs(row.advantages) >= 1e-9)) for row in made
    ]
    return whiten_rows(made) if variant.whiten else made


def blocks_of(trees: Sequence[tuple[RolloutTree, int]], tokens: int) -> list[list[int]]:
    """Places of the trees of each block: equally many in each, about `tokens` sampled; what is left over goes."""
    mean = sum(count for _, count in trees) / len(trees)
    size = max(1, min(round(tokens / mean), len(trees) // 8))
    return [list(range(start, start + size)) for start in range(0, len(trees) - size + 1, size)]


def measure(shape: str, arguments: argparse.Namespace, name: str | None = None) -> Measured:
    """Sample one plan's trees and take every variant's gradient of every block.

    Args:
        shape: the plan.
        arguments: of the command.
        name: another name draws other questions.
    """
    began = time.process_time()
    tokens = Tokens.load(arguments.model)
    trees = asyncio.run(sampled(shape, arguments, tokens, name or shape))
    sampling_s = time.process_time() - began
    blocks = blocks_of(trees, arguments.block_tokens)
    kept = [trees[place] for block in blocks for place in block]
    model = load_policy(arguments.model)
    layouts = {v.name: packed([tree for tree, _ in kept], v) for v in variants(shape)}
    per_tree = [len(rows(advantages(tree, _plain(shape)), mask_threshold=None)) for tree, _ in kept]
    ends = np.cumsum(
        [sum(per_tree[b * len(blocks[0]) : (b + 1) * len(blocks[0])]) for b in range(len(blocks))]
    )
    measured = Measured(gradients={name: [] for name in layouts})
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        found = gradients(model, {name: whole[first:last] for name, whole in layouts.items()})
        for name, gradient in found.items():
            measured.gradients[name].append(gradient)
    measured.counts = counts(shape, kept, layouts)
    measured.counts |= {
        "blocks": len(blocks),
        "sampling_cpu_s": round(sampling_s, 1),
        "gradients_cpu_s": round(time.process_time() - began - sampling_s, 1),
    }
    return measured


def _plain(shape: str) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate(
        {"name": variants(shape)[0].algorithm, "drop_zero": False}
    )


def gradients(model: Any, layouts: dict[str, list[Row]]) -> dict[str, np.ndarray]:
    """[P] gradient of each variant's summed policy loss: one forward pass for all, one backward pass for each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    totals = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in layouts}
    anything = np.any(
        [[bool(row.participates.any()) for row in whole] for whole in layouts.values()], axis=0
    )
    used = {
        name: [row for row, wanted in zip(whole, anything, strict=True) if wanted]
        for name, whole in layouts.items()
    }
    first = next(iter(used))
    order = {name: micro_batches(whole, token_budget=8192) for name, whole in used.items()}
    for place, micro in enumerate(order[first]):
        logprobs = score(model, collate(micro, 0, "cpu")).logprobs
        for name in layouts:
            batch = collate(order[name][place], 0, "cpu")
            leaf = logprobs.detach().requires_grad_()
            loss = policy_loss(
                leaf, batch.behaviour_logprobs, batch.advantages, batch.participates, denominator=1
            ).loss
            (slope,) = torch.autograd.grad(loss, leaf)
            parts = torch.autograd.grad(logprobs, parameters, slope, retain_graph=True)
            totals[name] += torch.cat([part.flatten() for part in parts])
    return {name: total.numpy() for name, total in totals.items()}


def counts(
    shape: str, trees: Sequence[tuple[RolloutTree, int]], layouts: dict[str, list[Row]]
) -> dict[str, float]:
    """What the trees look like, on average."""
    sampled_tokens = sum(count for _, count in trees)
    found = [advantages(tree, _plain(shape)) for tree, _ in trees]
    useful = [[s for s in segments if not negligible(s.advantage)] for segments in found]
    answers = [
        node.reward for tree, _ in trees for node in tree.leaves() if node.role is not Role.ROLLOUT
    ]
    result: dict[str, float] = {
        "questions": len(trees),
        "tokens_per_question": sampled_tokens / len(trees),
        "accuracy": float(np.mean([float(reward or 0.0) for reward in answers])),
        "no_signal": float(np.mean([not segments for segments in useful])),
        "segments": sum(map(len, found)) / len(trees),
        "signal_segments": sum(map(len, useful)) / len(trees),
    }
    wide = next(whole for name, whole in layouts.items() if "mask" not in name)
    result["computed"] = sum(len(r) for r in wide if r.participates.any()) / sampled_tokens
    for name, whole in layouts.items():
        taking_part = sum(int(row.participates.sum()) for row in whole)
        result[f"participating {name}"] = taking_part / sampled_tokens
    return result


def make_metric(model: str, arguments: argparse.Namespace) -> np.ndarray:
    """[P] what Adam divides by: each parameter's root mean square over the blocks of a pilot of its own.

    At least its tensor's mean, for a parameter that the pilot hardly moved (a rare token's embedding) would
    outweigh all others.
    """
    pilot = argparse.Namespace(**{**vars(arguments), "tokens": 30_000})
    blocks = measure("group:8", pilot, "pilot").gradients["rloo"]
    scale: np.ndarray = np.sqrt(np.square(np.stack(blocks)).mean(0))
    start = 0
    for parameter in load_policy(model).parameters():
        part = scale[start : (start := start + parameter.numel())]
        np.maximum(part, part.mean(), out=part)
    return scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=plan_of.__doc__)
    parser.add_argument("--model", default=str(ROOT / "configs/quickstart/warmstart"))
    parser.add_argument("--tokens", type=int, default=60_000, help="sampled for each plan")
    parser.add_argument("--batch-tokens", type=int, default=20_000)
    parser.add_argument("--block-tokens", type=int, default=2_500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operations", type=int, default=0, help="only stories of so many; 0: all")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / METRIC).exists():
        np.save(arguments.out / METRIC, make_metric(arguments.model, arguments))
    for shape in arguments.shapes:
        if not (arguments.out / f"{shape.replace(':', '_')}.npz").exists():
            measured = measure(shape, arguments)
            keep(shape, measured.gradients, measured.counts, arguments.out)
            print(shape, json.dumps(measured.counts), flush=True)
    records = table(arguments.out, arguments.batch_tokens)
    print(*show(records), sep="\n")
    print(json.dumps(records))


if __name__ == "__main__":
    main()
