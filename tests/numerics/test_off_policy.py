"""The correction for the behaviour policy: against a loop over tokens, in its limits, and where it is exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.losses import OffPolicy, policy_loss
from trainer.settings import Correction, KLEstimator

CORRECTIONS = [Correction.TRUNCATED, Correction.MASKED]
logprob = st.floats(-30, 0)
token = st.tuples(logprob, logprob, logprob, st.floats(-3, 3), logprob, st.booleans())
batch = st.lists(token, min_size=1, max_size=12)


def run(tokens, off_policy, denominator, *, proximal=True, **options):
    """(result, gradient) of columns new, proximal, behaviour, advantage, ref, participating."""
    *numbers, mask = zip(*tokens, strict=True)
    new, near, old, advantages, ref = (torch.tensor(c, dtype=torch.float64) for c in numbers)
    new.requires_grad_()
    result = policy_loss(
        new, old, advantages, torch.tensor(mask), denominator=denominator, ref_logprobs=ref,
        off_policy=off_policy, proximal_logprobs=near if proximal else None, **options,
    )  # fmt: skip
    result.loss.backward()
    return result, new.grad


@naive.examples
@given(batch, st.sampled_from(CORRECTIONS), st.floats(1.01, 50), st.floats(0, 2))
def test_loss_and_gradient_are_those_of_a_loop_over_tokens(tokens, correction, limit, kl_coef):
    count = sum(participating for *_, participating in tokens)
    off_policy = OffPolicy(correction=correction, limit=limit)
    result, gradient = run(tokens, off_policy, count, kl_coef=kl_coef)
    expected_loss, expected_gradient, weights, limited = 0.0, [], 0.0, 0
    for new, near, old, advantage, ref, participating in tokens:
        w = math.exp(max(-10.0, min(10.0, near - old)))
        if correction == "truncated":
            weight, far = min(w, limit), w > limit
        else:
            far = w > limit or w < 1 / limit
            weight = 0.0 if far else w
        loss, slope = naive.token_loss(
            new, near, advantage, ref, low=0.2, high=0.2, kl_coef=kl_coef, kl="k3"
        )
        expected_loss += participating * weight * loss / max(count, 1)
        expected_gradient.append(participating * weight * slope / max(count, 1))
        weights += participating * weight
        limited += participating and far
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-9, abs=1e-9)
    assert gradient.tolist() == pytest.approx(expected_gradient, rel=1e-9, abs=1e-9)
    assert float(result.sums.weight) == pytest.approx(weights)
    assert int(result.sums.limited) == limited


@naive.examples
@given(batch, st.sampled_from(CORRECTIONS))
def test_where_the_proximal_policy_sampled_it_is_the_plain_loss(tokens, correction):
    """Bit for bit: w is exp(0), and the ratio is to the same logprobs."""
    tokens = [(new, old, old, *rest) for new, _, old, *rest in tokens]
    count = sum(participating for *_, participating in tokens)
    ours, gradient = run(tokens, OffPolicy(correction=correction, limit=2.0), count, kl_coef=0.1)
    plain, plain_gradient = run(tokens, None, count, kl_coef=0.1)
    assert ours.loss.item() == plain.loss.item()
    assert gradient.tolist() == plain_gradient.tolist()
    assert ours.sums.means() == plain.sums.means()


@naive.examples
@given(batch, st.sampled_from(CORRECTIONS))
def test_the_first_update_of_a_step_needs_no_second_pass(tokens, correction):
    tokens = [(new, new, *rest) for new, _, *rest in tokens]
    off_policy = OffPolicy(correction=correction, limit=2.0)
    given_, gradient = run(tokens, off_policy, 3)
    own, own_gradient = run(tokens, off_policy, 3, proximal=False)
    assert given_.loss.item() == own.loss.item()
    assert gradient.tolist() == own_gradient.tolist()
    assert given_.sums.means() == own.sums.means()


def test_a_masked_token_leaves_the_loss_and_not_the_denominator():
    near = (-1.0, -1.0, -1.1, 0.5, -2.0, True)
    far = (-1.0, -1.0, -6.0, 0.7, -2.0, True)  # sampled at e^-5 of its probability now
    off_policy = OffPolicy(correction=Correction.MASKED, limit=2.0)
    both, gradient = run([near, far], off_policy, 2, kl_coef=0.1)
    alone, alone_gradient = run([near], off_policy, 2, kl_coef=0.1)
    assert both.loss.item() == alone.loss.item()
    assert gradient.tolist() == [*alone_gradient.tolist(), 0.0]
    assert both.sums.means()["limited"] == 0.5


def test_a_truncated_token_pulls_with_the_limit():
    far = (-1.0, -1.0, -6.0, 0.7, -2.0, True)
    _, gradient = run([far], OffPolicy(correction=Correction.TRUNCATED, limit=2.0), 1)
    assert gradient.tolist() == pytest.approx([-2.0 * 0.7])


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_a_limit_the_gradient_is_that_of_the_policy_itself(correction):
    """All outcomes of one token, weighed as the behaviour policy samples them: the expected gradient is exactly
    that of sampling from the policy. With a limit it is nearer to it than without any correction."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    behaviour = (logits + torch.randn(7, generator=generator, dtype=torch.float64)).log_softmax(-1)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)

    def expected(off_policy, sampled_by):
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        for outcome in range(7):
            one = slice(outcome, outcome + 1)
            result = policy_loss(
                logprobs[one], sampled_by[one], advantages[one], torch.ones(1, dtype=torch.bool),
                denominator=1, off_policy=off_policy, kl=KLEstimator.NONE,
                clip_low=0.999, clip_high=1e9,
            )  # fmt: skip
            total = total + sampled_by[outcome].exp() * result.loss
        total.backward()
        return leaf.grad

    target = expected(None, logits.log_softmax(-1))
    exact = expected(OffPolicy(correction=correction, limit=1e6), behaviour)
    assert exact.tolist() == pytest.approx(target.tolist(), abs=1e-12)
    limited = expected(OffPolicy(correction=Correction.TRUNCATED, limit=2.0), behaviour)
    assert 0 < (limited - target).norm() < target.norm()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_does_not_take_part_may_hold_anything(correction, garbage):
    taking_part = (-1.0, -1.1, -1.2, 0.5, -0.9, True)
    off_policy = OffPolicy(correction=correction, limit=2.0)
    clean, clean_gradient = run([taking_part], off_policy, 1, kl_coef=0.1)
    result, gradient = run([(garbage,) * 5 + (False,), taking_part], off_policy, 1, kl_coef=0.1)
    assert result.loss.item() == clean.loss.item()
    assert gradient.tolist() == [0.0, *clean_gradient.tolist()]
