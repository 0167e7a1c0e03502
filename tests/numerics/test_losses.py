"""The loss against a loop over tokens with derivatives by hand, and cut into micro-batches in every way."""

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.losses import LossSums, policy_loss, total
from trainer.settings import KLEstimator

logprob = st.floats(-30, 0)
token = st.tuples(logprob, logprob, st.floats(-3, 3), logprob, st.booleans())
batch = st.lists(token, min_size=1, max_size=12)
NAN, INF = math.nan, math.inf


def columns(tokens):
    """(logprobs, behaviour, advantages, ref, participating), float64."""
    *numbers, mask = zip(*tokens, strict=True)
    new, old, advantages, ref = (torch.tensor(column, dtype=torch.float64) for column in numbers)
    return new.requires_grad_(), old, advantages, ref, torch.tensor(mask)


def run(tokens, denominator, **options):
    new, old, advantages, ref, mask = columns(tokens)
    if options.pop("no_ref", False):
        ref = None
    result = policy_loss(
        new, old, advantages, mask, denominator=denominator, ref_logprobs=ref, **options
    )
    result.loss.backward()
    return result, new.grad


@naive.examples
@given(batch, st.sampled_from(KLEstimator), st.floats(0, 2), st.floats(0.05, 0.9), st.booleans())
def test_loss_and_gradient_are_those_of_a_loop_over_tokens(tokens, kl, kl_coef, low, no_ref):
    high = low / 2
    count = sum(participating for *_, participating in tokens)
    result, gradient = run(
        tokens, count, kl=kl, kl_coef=kl_coef, clip_low=low, clip_high=high, no_ref=no_ref
    )
    expected_loss, expected_gradient = 0.0, []
    for new, old, advantage, ref, participating in tokens:
        loss, slope = naive.token_loss(
            new, old, advantage, None if no_ref else ref, low=low, high=high, kl_coef=kl_coef, kl=kl
        )
        expected_loss += participating * loss / max(count, 1)
        expected_gradient.append(participating * slope / max(count, 1))
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-9, abs=1e-9)
    assert gradient.tolist() == pytest.approx(expected_gradient, rel=1e-9, abs=1e-9)


@naive.examples
@given(batch, st.data())
def test_gradient_is_the_same_however_the_batch_is_cut(tokens, data):
    """Bit for bit, since no token's gradient looks at another's; the sums add up to those of the batch."""
    count = sum(participating for *_, participating in tokens)
    options = {"kl_coef": 0.1}
    whole, gradient = run(tokens, count, **options)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)))) | {0, len(tokens)})
    parts = [
        run(tokens[start:end], count, **options) for start, end in pairwise(cuts) if end > start
    ]
    assert torch.cat([grad for _, grad in parts]).tolist() == gradient.tolist()
    assert sum(part.loss.item() for part, _ in parts) == pytest.approx(whole.loss.item(), abs=1e-9)
    sums = total(part.sums for part, _ in parts)
    for field in fields(LossSums):
        ours, theirs = getattr(sums, field.name), getattr(whole.sums, field.name)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-9, abs=1e-9), field.name


def test_shapes_do_not_matter():
    tokens = [(-1.0, -1.2, 0.5, -0.9, True), (-2.0, -1.9, -1.0, -2.1, False)] * 3
    flat, gradient = run(tokens, 3)
    new, old, advantages, ref, mask = (c.detach().reshape(2, 3) for c in columns(tokens))
    new.requires_grad_()
    square = policy_loss(new, old, advantages, mask, denominator=3, ref_logprobs=ref)
    square.loss.backward()
    assert square.loss.item() == flat.loss.item()
    assert new.grad.flatten().tolist() == gradient.tolist()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_what_does_not_take_part_may_hold_anything(garbage):
    taking_part = (-1.0, -1.2, 0.5, -0.9, True)
    clean, clean_gradient = run([taking_part], 1, kl_coef=0.1)
    result, gradient = run([(garbage,) * 4 + (False,), taking_part], 1, kl_coef=0.1)
    assert result.loss.item() == clean.loss.item()
    assert result.sums.means() == clean.sums.means()
    assert gradient.tolist() == [0.0, *clean_gradient.tolist()]


@pytest.mark.parametrize(
    "tokens", [[], [(-1.0, -1.0, 1.0, -1.0, False)], [(NAN,) * 4 + (False,)] * 2]
)
def test_nothing_participating_is_a_zero_with_zero_gradients(tokens):
    new, old, advantages, ref = (torch.tensor([t[i] for t in tokens]) for i in range(4))
    new.requires_grad_()
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    result = policy_loss(new, old, advantages, mask, denominator=0, kl_coef=1.0, ref_logprobs=ref)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert new.grad.tolist() == [0.0] * len(tokens)
    assert set(result.sums.means().values()) == {0.0}
    assert not result.sums.must_skip


@pytest.mark.parametrize(
    ("shift", "skipped"), [(math.log(10) - 1e-3, False), (math.log(10) + 1e-3, True)]
)
def test_the_skip_limit_is_a_mean_ratio_of_ten(shift, skipped):
    """Over the whole optimizer batch: one wild micro-batch among tame ones is no reason."""
    wild, _ = run([(-1.0, -1.0 - shift, 0.1, -1.0, True)], 1)
    tame, _ = run([(-1.0, -1.0, 0.1, -1.0, True)], 1)
    assert wild.sums.must_skip is skipped
    assert not (wild.sums + tame.sums).must_skip


def test_metrics_are_detached():
    result, _ = run([(-1.0, -1.2, 0.5, -0.9, True)], 1)
    assert not any(getattr(result.sums, field.name).requires_grad for field in fields(LossSums))
    assert result.sums.means()["mismatch"] == pytest.approx(0.2)
