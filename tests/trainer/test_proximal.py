"""The proximal policy of a step with several updates: scored once, before the first, packed as it trains."""

import random

import pytest
import torch

from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.losses import OffPolicy
from trainer.optimizer import PolicyOptimizer
from trainer.packing import PAD, collate, optimizer_batches
from trainer.policy import load_policy, token_logprobs
from trainer.proximal import rows_with, score_proximal
from trainer.settings import Correction, TrainerSettings
from trainer.update import Learner


def segments(count=3):
    """Trees of two branches of two, with one sure token, told apart by their tokens."""
    found = []
    for place in range(count):
        counts = [3, 2, 4, 2]
        logprobs = [[-1.5] * n for n in counts]
        logprobs[2][3] = 0.0
        ids = [
            [2 + (31 * (place + 1) * (i + 1) + t) % 300 for t in range(n)]
            for i, n in enumerate(counts)
        ]
        tree = naive.make_tree(
            [0, 0, 1, 1], counts, [None, 0.0, 1.0, 0.0], logprobs=logprobs, token_ids=ids
        )
        found += [Segment(tree=tree, node_id=i, advantage=0.5 - i % 2) for i in (1, 2, 3, 4)]
    return found


def learner(model, **settings):
    policy = load_policy(model)
    chosen = TrainerSettings(
        **({"steps": 10, "learning_rate": 1e-3, "warmup_steps": 0, "kl_coef": 0.0} | settings)
    )
    return Learner(
        policy=policy, reference=None, optimizer=PolicyOptimizer(policy, chosen, total_steps=10),
        settings=chosen, temperature=1.0, mask_threshold=0.9, max_tokens=16,
        off_policy=OffPolicy(correction=Correction.TRUNCATED, limit=2.0),
    )  # fmt: skip


def test_every_participating_token_has_the_logprob_of_a_pass_over_its_own_row(tiny_math):
    policy, trained = load_policy(tiny_math), segments()
    proximal = score_proximal(policy, trained, mask_threshold=0.9, temperature=1.0, token_budget=24)
    seen = 0
    for share in optimizer_batches(trained, 2, random.Random(0)):
        for row in rows_with(share, proximal, mask_threshold=0.9):
            with torch.no_grad():
                alone = token_logprobs(policy, collate([row], PAD, "cpu"))[0].numpy()
            where = row.participates
            assert row.proximal_logprobs[where] == pytest.approx(alone[where], abs=1e-5)
            seen += int(where.sum())
    assert seen == 3 * (3 + 2 + 3 + 2)


def test_the_second_update_of_a_step_is_clipped_around_its_start(tiny_math):
    one = learner(tiny_math, updates_per_step=1, epochs=2)
    trained = segments()
    proximal = one.proximal(trained)
    assert proximal is not None
    first = one.update(trained, proximal)
    second = one.update(trained, proximal)
    assert first.means["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(second.means["ratio"] - 1.0) > 1e-4
    # The weights are of the proximal policy, which both updates share.
    assert second.means["weight"] == pytest.approx(first.means["weight"], abs=1e-6)


def test_one_update_a_step_makes_no_second_pass(tiny_math):
    assert learner(tiny_math).proximal(segments()) is None
