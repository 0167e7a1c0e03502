"""Requests of all kinds, drawn by a seed: what a load test sends."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from server.costs import Cost, most
from shared.wire import RolloutTreeRequest
from trainer.problems import Split, stories

MAX_TOKENS = 128
"""Of a response; the tiny model's have some sixty."""
MEDIA = ("application/json", "application/msgpack", "application/x-ndjson")
Body = dict[str, Any]


def tree(factors: list[int], segment: int) -> Body:
    """A tree plan."""
    return {"kind": "tree", "branch_factors": factors, "segment_tokens": segment}


def chain(samples: int, rollouts: int, **partition: Any) -> Body:
    """A chain plan."""
    return {
        "kind": "chain", "samples": samples, "value_rollouts": rollouts, "partition": partition
    }  # fmt: skip


PLANS: tuple[Body, ...] = (
    tree([6, 6, 6], 30),
    tree([4, 5, 6], 20),
    tree([4, 4], 24),
    tree([2, 3, 4, 2], 12),
    tree([1, 8], 16),
    tree([3, 2, 2], 8),
    {"kind": "group", "samples": 8},
    {"kind": "group", "samples": 48},
    chain(4, 4, kind="fixed", tokens=24),
    chain(3, 5, kind="cutpoints", threshold=0.9, interval=5),
    chain(3, 4, kind="delimiter", delimiter="."),
    chain(6, 6, kind="whole"),
)


def questions(seed: int, count: int = 2000) -> list[tuple[str, str]]:
    """(prompt, reference answer) of so many problems."""
    found = stories(Split.TRAIN, seed)
    return [(row["question"] + "\n", row["answer"]) for row in islice(found, count)]


def plain_body(question: tuple[str, str], plan: Body) -> Body:
    """A request as a trainer sends it."""
    prompt, reference = question
    return {
        "prompt": prompt,
        "plan": plan,
        "sampling": {"max_tokens": MAX_TOKENS},
        "reward": {"name": "gsm8k", "reference": reference},
        "return_text": False,
    }


def bodies(rng: random.Random) -> Iterator[Body]:
    """Endless requests: all plans, some with texts, seeds, other temperatures, short limits, without rewards."""
    found = questions(rng.randrange(1 << 30))
    while True:
        body = plain_body(rng.choice(found), rng.choice(PLANS))
        body["return_text"] = rng.random() < 0.5
        sampling = body["sampling"] = {
            "max_tokens": rng.choice([MAX_TOKENS, MAX_TOKENS, 40, 7]),
            "temperature": rng.choice([1.0, 1.0, 0.6, 0.0]),
        }
        if rng.random() < 0.4:
            sampling["seed"] = rng.randrange(1 << 40)
        if rng.random() < 0.2:
            body["reward"]["options"] = {"unfinished": -0.5}
        if rng.random() < 0.1:
            del body["reward"]
        yield body


def mean_cost(some: list[Body]) -> Cost:
    """The most that these requests can come to, on average: what a server's gate counts them as at first."""
    costs = [
        most(r.plan, r.sampling.max_tokens) for r in map(RolloutTreeRequest.model_validate, some)
    ]
    return Cost(
        nodes=max(1, sum(cost.nodes for cost in costs) // len(costs)),
        tokens=max(1, sum(cost.tokens for cost in costs) // len(costs)),
    )
