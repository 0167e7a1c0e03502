"""What early decisions save, and what they cost a trainer: `shared.wire.Savings`, each against the full trees.

The quickstart's warm start answers the quickstart's stories; the same questions and seeds with every option. What
is `rare` it answers rightly at most 2 times in 8 others, what is `sure` at least 6 times. Each question's tree
grows twice: the second has the first's segments at depth 1 and other streams below, so the two say how much a
value varies. Columns:

    saved       sampled tokens saved, probes counted
    early       trees with an early decision
    questions   kept of the questions whose full tree has any advantage
    segments    kept of those with |A| > 1e-9
    A^2         sum of A^2 over the participating tokens (p < 0.9): how much of the full trees' gradient is kept
    along       sum of A A_full / sum of A_full^2: the same along the full trees' advantages, so that what noisier
                values add to A^2 is not taken for signal
    per token   `along` over the share of tokens still sampled; above 1 is a gain. Where questions are kept whole
                or lost, signal to noise at an equal number of sampled tokens grows by this factor
    bias        mean of V(prompt) less the full trees'
    variance    of V at depth 1, given the segments, over the full trees'

`settle_after` only leaves nodes of the full tree out and a `probe` that agrees is the tree, so these come from the
full trees and one probe of each question; some are sampled again with the option, to check. `branch_tokens` is
sampled. A from spo_tree, whole: no whitening. Errors: bootstrap over questions.

    python tests/benchmarks/savings.py [--questions 96] [SHAPE ...]
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

import torch  # noqa: E402 - after the path

from server.answer import wire_nodes  # noqa: E402
from server.branches import Branch  # noqa: E402
from server.continuations import Continuations  # noqa: E402
from server.engines.base import Completion, Engine  # noqa: E402
from server.engines.settings import EngineSettings  # noqa: E402
from server.engines.transformers import open_engine  # noqa: E402
from server.grading import Grading  # noqa: E402
from server.rewards.gsm8k import gsm8k  # noqa: E402
from server.sampler import sample  # noqa: E402
from server.seeds import state_seed  # noqa: E402
from server.tokens import Tokens  # noqa: E402
from shared.tree import RolloutTree  # noqa: E402
from shared.wire import Plan, Reward, Sampling, Savings, TreePlan  # noqa: E402
from tests.benchmarks.gradient_signal import MAX_TOKENS, plan_of  # noqa: E402
from tests.benchmarks.savings_table import FIELDS, MIXES, compared, show, summary, variances  # noqa: E402
from tests.numerics.table_engine import Grades  # noqa: E402
from trainer.problems import Row, Split, stories  # noqa: E402

SETTLE, PROBE, BRANCH = (2, 3), (3, 4, 6, 8), (0.5, 0.75)
GROUP_SETTLE = (2, 3, 4, 8)
CHECKED = 4
"""Questions whose derived trees are sampled again."""


class Twin(Continuations):
    """Continuations that begin as another's: other streams for all but the first tokens of a response."""

    async def after(
        self, response: tuple[int, ...], samples: int, *, seed: int, **options: Any
    ) -> list[Completion]:
        """As `Continuations.after`."""
        other = (1 << 61) if response else 0
        return await super().after(response, samples, seed=seed + other, **options)


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree, and what it cost."""

    tree: RolloutTree
    tokens: int
    decisions: int


@dataclass(frozen=True, slots=True)
class Grower:
    """Grows trees of the questions as a server does."""

    engine: Engine
    tokens: Tokens
    questions: Sequence[Row]
    seed: int

    async def grow(self, at: int, twin: int, plan: Plan, savings: Savings | None = None) -> Grown:
        """The tree of one question."""
        continuations, grading = self._opened(at, twin)
        root = await sample(plan, continuations, savings=savings, grading=grading)
        return await _graded(root, continuations, grading)

    async def probe(self, at: int, number: int = 0) -> Grown:
        """Whole responses from the streams of a probe, or from others by number."""
        continuations, grading = self._opened(at, 0)
        seed = state_seed(continuations.seed, ()) + (number << 61)
        root = Branch.prompt()
        for completion in await continuations.after((), max(PROBE), seed=seed):
            response = tuple(completion.token_ids)
            root.children.append(Branch(completion=completion, response=response))
        return await _graded(root, continuations, grading)

    def _opened(self, at: int, twin: int) -> tuple[Continuations, Grading]:
        question, kind = self.questions[at], Twin if twin else Continuations
        continuations = kind(
            engine=self.engine,
            tokens=self.tokens,
            prompt=tuple(self.tokens.encode(question["question"] + "\n")),
            sampling=Sampling(temperature=1.0, max_tokens=MAX_TOKENS),
            seed=self.seed * 1_000_003 + at,
        )
        rewards: Any = Grades(lambda text, reference: gsm8k(text, reference, {}))
        reward = Reward(name="gsm8k", reference=question["answer"])
        return continuations, Grading(self.tokens, rewards, reward)


async def _graded(root: Branch, continuations: Continuations, grading: Grading) -> Grown:
    await grading.below(root)
    nodes = wire_nodes(root, continuations.prompt, grading.grades, None)
    counts = continuations.counts
    return Grown(RolloutTree(nodes=nodes), counts.sampled, counts.decisions)


def settled(full: Grown, after: int) -> Grown:
    """What is left of a full tree by `settle_after`."""
    tree, decisions = full.tree, 0

    def kept(node_id: int) -> tuple[list[int], set[float | None]]:
        """Nodes and rewards below a node."""
        nonlocal decisions
        children = tree.children[node_id]
        ids: list[int] = []
        rewards: set[float | None] = set() if children else {tree.nodes[node_id].reward}
        for place, child in enumerate(children):
            if place == after and len(rewards) == 1:
                decisions += 1
                break
            below, own = kept(child)
            ids += [child, *below]
            rewards |= own
        return ids, rewards

    ids = [0, *kept(0)[0]]
    new = {old: place for place, old in enumerate(ids)}
    nodes = []
    for old in ids:
        node = tree.nodes[old]
        parent = None if node.parent is None else new[node.parent]
        nodes.append(node.model_copy(update={"id": new[old], "parent": parent}))
    left = RolloutTree(nodes=nodes)
    return Grown(left, sum(len(node.token_ids) for node in nodes[1:]), decisions)


def probed(full: Grown, probe: Grown, samples: int) -> Grown:
    """What `probe` makes of a question: its responses if they agree, else the full tree and what they cost."""
    nodes = probe.tree.nodes[: 1 + samples]
    cost = sum(len(node.token_ids) for node in nodes[1:])
    if len({node.reward for node in nodes[1:]}) == 1:
        return Grown(RolloutTree(nodes=nodes), cost, 1)
    return Grown(full.tree, full.tokens + cost, 0)


async def together(jobs: Sequence[Coroutine[Any, Any, Grown]]) -> list[Grown]:
    """All of them, some at a time: the engine's batch stays full and its memory small."""
    gate = asyncio.Semaphore(16)

    async def one(job: Coroutine[Any, Any, Grown]) -> Grown:
        async with gate:
            return await job

    return await asyncio.gather(*(one(job) for job in jobs))


async def measure(grower: Grower, shape: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One plan's records, and what holds for all of them."""
    plan = plan_of(shape)
    is_tree = isinstance(plan, TreePlan)
    # A group's twin would be the group itself.
    places = [(at, twin) for at in range(len(grower.questions)) for twin in range(1 + is_tree)]
    full = await together([grower.grow(at, twin, plan) for at, twin in places])
    mean = sum(one.tokens for one in full) / len(full)
    saved: dict[str, list[Grown]] = {
        f"settle_after={n}": [settled(one, n) for one in full]
        for n in (SETTLE if is_tree else GROUP_SETTLE)
    }
    if is_tree:
        probes = await together([grower.probe(at, twin) for at, twin in places])
        for n in PROBE:
            pairs = zip(full, probes, strict=True)
            saved[f"probe={n}"] = [probed(whole, probe, n) for whole, probe in pairs]
        for share in BRANCH:
            savings = Savings(branch_tokens=round(share * mean))
            grown = [grower.grow(at, twin, plan, savings) for at, twin in places]
            saved[f"branch_tokens={share:.0%}"] = await together(grown)
    same = await check(grower, plan, saved, len(places) // len(grower.questions))
    others = await together([grower.probe(at, 2) for at in range(len(grower.questions))])
    right = [sum(leaf.reward or 0.0 for leaf in one.tree.leaves()) for one in others]
    records = []
    for option, trees in saved.items():
        found = np.zeros((len(grower.questions), 1 + is_tree, len(FIELDS)))
        for (at, twin), whole, one in zip(places, full, trees, strict=True):
            counts = compared(whole.tree, one.tree)
            counts |= {"full_tokens": whole.tokens, "tokens": one.tokens}
            counts |= {"early": one.decisions > 0, "trees": 1}
            found[at, twin] = [counts.get(name, 0.0) for name in FIELDS]
        for at in range(len(grower.questions) if is_tree else 0):
            twins = slice(2 * at, 2 * at + 2)
            pairs_of_trees = [[one.tree for one in grown[twins]] for grown in (full, trees)]
            for name, value in variances(*pairs_of_trees).items():
                found[at, 0, FIELDS.index(name)] = value
        for mix, wanted in MIXES.items():
            of_mix = found[[at for at, count in enumerate(right) if count in wanted]]
            records.append({"shape": shape, "option": option, "mix": mix, **summary(of_mix)})
    return records, {"shape": shape, "tokens_per_tree": round(mean, 1), "checked_same": same}


async def check(grower: Grower, plan: Plan, saved: dict[str, list[Grown]], twins: int) -> str:
    """How many of the derived trees come out the same when they are sampled with the option."""
    options = [name for name in saved if not name.startswith("branch")]
    right = 0
    for name in options:
        option, _, number = name.partition("=")
        savings = Savings(**{option: int(number)})
        for at in range(CHECKED):
            again = await grower.grow(at, 0, plan, savings)
            derived = saved[name][at * twins]
            tokens = [[node.token_ids for node in one.tree.nodes] for one in (again, derived)]
            counts = [(one.tokens, one.decisions) for one in (again, derived)]
            right += tokens[0] == tokens[1] and counts[0] == counts[1]
    return f"{right} of {len(options) * CHECKED}"


async def run(arguments: argparse.Namespace) -> None:
    """Measure every shape on one engine."""
    settings = EngineSettings(model=arguments.model, dtype="float32", device="cpu", max_batch=192)
    engine = await open_engine(settings)
    questions = list(islice(stories(Split.TRAIN, arguments.seed), arguments.questions))
    grower = Grower(engine, Tokens.load(arguments.model), questions, arguments.seed)
    found, notes = [], []
    try:
        for shape in arguments.shapes:
            began = time.process_time()
            records, note = await measure(grower, shape)
            note |= {"cpu_s": round(time.process_time() - began, 1)}
            print(*show(records, note), sep="\n", flush=True)
            found += records
            notes.append(note)
    finally:
        await engine.close()
    print(json.dumps({"questions": len(questions), "plans": notes, "records": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = ["tree:4-2-2:25", "tree:6-6-6:25", "group:16"]
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", default=shapes, help=plan_of.__doc__)
    parser.add_argument("--model", default=str(ROOT / "configs/quickstart/warmstart"))
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
