"""One update on odd batches: finite everywhere, and the policy moves only where something participates."""

import math
from dataclasses import replace

import pytest
import torch

from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.losses import OffPolicy
from trainer.optimizer import PolicyOptimizer
from trainer.policy import load_policy
from trainer.settings import Correction, TrainerSettings
from trainer.update import Learner

SURE, UNSURE = [0.0], [-1.5]


@pytest.fixture(scope="module")
def model(tiny_math):
    return tiny_math


def learner(model, *, mask=0.9, **settings):
    policy = load_policy(model)
    chosen = TrainerSettings(
        **({"steps": 10, "learning_rate": 1e-3, "warmup_steps": 0, "kl_coef": 0.0} | settings)
    )
    optimizer = PolicyOptimizer(policy, chosen, total_steps=10)
    reference = load_policy(model) if chosen.kl_coef else None
    return Learner(
        policy=policy, reference=reference, optimizer=optimizer, settings=chosen, temperature=1.0,
        mask_threshold=mask, max_tokens=16,
    )  # fmt: skip


def segments(counts, advantages, logprobs):
    each = [logprob * count for logprob, count in zip(logprobs, counts, strict=True)]
    tree = naive.make_tree([0] * len(counts), counts, [1.0] * len(counts), logprobs=each)
    return [Segment(tree=tree, node_id=i, advantage=a) for i, a in enumerate(advantages, start=1)]


def update(one, batch):
    before = {name: value.clone() for name, value in one.policy.state_dict().items()}
    report = one.update(batch)
    after = one.policy.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert all(math.isfinite(mean) for mean in report.means.values())
    assert math.isfinite(report.entropy)
    assert math.isfinite(report.step.gradient_norm)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    return report, moved


@pytest.mark.parametrize("whiten", ["batch", "micro_batch", "off"])
@pytest.mark.parametrize("average", ["token", "sequence", "constant", "micro_batch"])
@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (([], [], []), "nothing participates"),
        (([0], [1.0], [UNSURE]), "nothing participates"),
        (([3, 2], [0.5, -0.5], [SURE, SURE]), "nothing participates"),
        (([3, 2], [0.5, -0.5], [UNSURE, SURE]), None),
        (([1], [0.7], [UNSURE]), None),
        (([4], [0.7], [UNSURE]), None),
        (([2, 2], [0.3, 0.3], [UNSURE, UNSURE]), None),
        (([2, 0, 3], [1.0, 0.5, -1.0], [UNSURE, UNSURE, UNSURE]), None),
    ],
    ids=[
        "empty",
        "no tokens",
        "all sure",
        "one unsure",
        "one token",
        "one response",
        "equal",
        "mixed",
    ],
)
def test_every_batch_is_finite(model, batch, reason, average, whiten):
    one = learner(model, average=average, whiten=whiten, token_budget=12)
    report, moved = update(one, segments(*batch))
    assert report.skipped_for == reason
    if reason:
        assert not moved
    # Behaviour logprobs here are made up, so the clip may leave a lone token without a gradient.
    elif batch[1] == [1.0, 0.5, -1.0]:
        assert moved


def test_a_batch_far_from_its_behaviour_takes_no_step(model):
    one = learner(model, mask=None)
    report, moved = update(one, segments([3], [1.0], [[-30.0]]))
    assert report.skipped_for == "ratio"
    assert not moved
    assert one.optimizer.skipped == 1


def test_a_batch_whose_tokens_are_all_masked_takes_no_step(model):
    """Momentum of the steps before it would move the weights by itself."""
    one = learner(model, mask=None, whiten="off")
    assert update(one, segments([3, 2], [1.0, -1.0], [UNSURE, UNSURE]))[1]
    one = replace(one, off_policy=OffPolicy(correction=Correction.MASKED, limit=1.5))
    report, moved = update(one, segments([3, 2], [1.0, -1.0], [[-30.0], [-25.0]]))
    assert report.means["limited"] == 1.0
    assert report.skipped_for == "nothing participates"
    assert not moved


def test_kl_alone_pulls_back_to_the_reference(model):
    """Advantages of zero: only the KL term is left, and at the reference itself it is zero too."""
    one = learner(model, mask=None, kl_coef=1.0, whiten="off")
    report, _ = update(one, segments([4, 3], [0.0, 0.0], [UNSURE, UNSURE]))
    assert report.means["kl"] == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        for parameter in one.policy.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    distances = []
    for _ in range(6):
        report, _ = update(one, segments([4, 3], [0.0, 0.0], [UNSURE, UNSURE]))
        distances.append(report.means["kl"])
    assert distances[-1] < distances[0]
