"""Whitening, KL and loss against the authors' numbers, which are float32.

Where the authors' code deviates from the design, their number is composed from our functions and the test says
what differs; where theirs is NaN or an error, ours is finite and the test says what it is.
"""

import json
import math

import numpy as np
import pytest
import torch

from trainer.losses import kl_penalty, policy_loss
from trainer.mask import participates
from trainer.settings import KLEstimator
from trainer.whiten import whiten

CLOSE = 1e-6
KLS = {"kl": KLEstimator.K1, "mse": KLEstimator.K2}


def cases(golden, name):
    return {
        c.get("name", c.get("type")): c for c in json.loads((golden / name).read_text())["cases"]
    }


@pytest.fixture
def ppo(golden):
    return cases(golden, "ppo_loss.json")


def approx(expected):
    return pytest.approx(np.array(expected, float), abs=CLOSE)


WHITENED = [
    "plain",
    "prob_mask_empty_falls_back_to_label_mask",
    "constant_values",
    "two_edges_only_rank_and_length_matter_A",
    "pad_logp_-1e9_is_masked_by_label",
]


def whiten_inputs(case):
    label = np.array(case["mask"], bool)
    probs = case["probs"]
    mask = label if probs is None else participates(label, np.log(np.array(probs)), 0.9)
    return np.array(case["values"]), mask, label


@pytest.mark.parametrize("name", WHITENED)
def test_whitened_values_are_the_authors(golden, name):
    case = cases(golden, "whiten.json")[name]
    values, mask, label = whiten_inputs(case)
    assert mask.sum() == case["effective_mask_count"]
    assert values[label].mean() == pytest.approx(case["masked_mean"], abs=CLOSE)
    assert whiten(values, mask, label) == approx(case["whitened"])


def test_whitening_is_finite_where_the_authors_is_nan(golden):
    """One token takes part: its unbiased variance is 0/0. Ours is 0 everywhere, and so it is for an empty mask."""
    known = cases(golden, "whiten.json")
    assert set(known) == {
        *WHITENED,
        "single_effective_token_gives_nan",
        "masked_mean zero mask -> NaN",
    }
    case = known["single_effective_token_gives_nan"]
    assert case["whitened"] == [["NaN"] * 3]
    values, mask, label = whiten_inputs(case)
    assert mask.sum() == case["effective_mask_count"] == 1
    assert whiten(values, mask, label).tolist() == [[0.0, 0.0, 0.0]]
    assert known["masked_mean zero mask -> NaN"]["out"] == "NaN"
    assert whiten(values, mask & False, label & False).tolist() == [[0.0, 0.0, 0.0]]


def test_kl_and_its_gradient_are_the_authors(golden):
    for name, case in cases(golden, "kl.json").items():
        logprob = torch.tensor(case["logprob"], requires_grad=True)
        kl = kl_penalty(logprob, torch.tensor(case["ref_logprob"]), KLS[name])
        kl.sum().backward()
        assert kl.detach().numpy() == pytest.approx(np.array(case["kl"]), rel=1e-6)
        assert logprob.grad.numpy() == approx(case["grad_wrt_logprob_of_sum"])


def tensors(case):
    """(logprobs, behaviour, advantages, participating, ref or None) as the authors' loss got them."""
    old = torch.tensor(case["old_probs"]).log()
    logprobs = (old + torch.tensor(case["delta_new_minus_old_logp"])).requires_grad_()
    label = torch.tensor(case["label_mask"]).bool()
    mask = participates(label, old, 0.9 if case["use_prob_mask"] else None)
    delta = case["delta_ref_minus_old_logp"]
    ref = None if delta is None else old + torch.tensor(delta)
    return logprobs, old, torch.tensor(case["advantages"]), mask, ref


def assert_metrics(sums, case):
    means, theirs = sums.means(), case["metrics"]
    assert means["approx_kl"] == pytest.approx(theirs["actor/approx_kl"], abs=CLOSE)
    assert -means["log_ratio"] == pytest.approx(theirs["actor/policy_kl"], abs=CLOSE)
    assert means["clipped"] == pytest.approx(theirs["actor/clip_frac"], abs=CLOSE)
    assert means["ratio"] == pytest.approx(theirs["actor/ratio"], rel=1e-6)


@pytest.mark.parametrize("name", ["on_policy_first_step_no_mask", "clip_both_signs"])
def test_clipped_loss_gradient_and_metrics_are_the_authors(ppo, name):
    case = ppo[name]
    logprobs, old, advantages, mask, ref = tensors(case)
    result = policy_loss(
        logprobs, old, advantages, mask, denominator=int(mask.sum()), ref_logprobs=ref
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(case["loss"], abs=CLOSE)
    assert logprobs.grad.numpy() == approx(case["grad_wrt_logprobs"])
    assert_metrics(result.sums, case)
    assert not result.sums.must_skip


@pytest.mark.parametrize("name", ["with_kl_loss", "with_kl_loss_coef1_no_prob_mask"])
def test_loss_with_kl_is_the_authors_but_for_the_mean(ppo, name):
    """The authors add up KL over a row's tokens and average over rows; the design averages over tokens, as
    the rest of the loss does. Ours times tokens / rows is theirs."""
    case = ppo[name]
    logprobs, old, advantages, mask, ref = tensors(case)
    tokens, coefficient = int(mask.sum()), case["kl_coef"]
    per_token = kl_penalty(logprobs.detach(), ref, KLEstimator.K3)
    assert (per_token * mask).numpy() == approx(case["ref_kl_tokens"])
    result = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        denominator=tokens,
        kl_coef=coefficient * tokens / len(logprobs),
        ref_logprobs=ref,
    )
    result.loss.backward()
    penalty = coefficient * float(result.sums.kl) / len(logprobs)
    assert penalty == pytest.approx(case["metrics"]["actor/ref_kl_loss"], abs=CLOSE)
    assert result.loss.item() == pytest.approx(case["loss"], abs=CLOSE)
    assert logprobs.grad.numpy() == approx(case["grad_wrt_logprobs"])
    assert_metrics(result.sums, case)


def test_nothing_participating_is_zero_where_the_authors_is_nan(ppo):
    case = ppo["whole_microbatch_fully_prob_masked_NaN"]
    assert case["loss"] == "NaN"
    logprobs, old, advantages, mask, _ = tensors(case)
    assert not mask.any()
    result = policy_loss(logprobs, old, advantages, mask, denominator=0)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert logprobs.grad.count_nonzero() == 0
    assert set(result.sums.means().values()) == {0.0}


def test_a_mean_ratio_above_ten_is_told_to_the_loop(ppo):
    """The authors multiply the loss by 0 and step all the same, which moves weights by momentum. Here the sums say
    that the batch must be skipped, and the loop takes no step."""
    case = ppo["ratio_threshold_skip"]
    assert case["skipped"]
    assert case["loss"] == 0.0
    logprobs, old, advantages, mask, _ = tensors(case)
    result = policy_loss(logprobs, old, advantages, mask, denominator=int(mask.sum()))
    assert_metrics(result.sums, case)
    assert result.sums.must_skip


def test_a_batch_of_one_row_works_where_the_authors_fails(ppo):
    case = ppo["batch_size_1_no_prob_mask"]
    assert case["error"].startswith("IndexError")
    logprobs, old, advantages, mask, _ = tensors(case)
    result = policy_loss(logprobs, old, advantages, mask, denominator=int(mask.sum()))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-1.0)
    assert logprobs.grad.numpy() == approx([[-1 / 3, -1 / 3, -1 / 3, 0.0]])


def test_the_authors_direct_value_loss_is_a_weighted_k2(ppo):
    """Not part of the design. Their number is, over rows, the mean of w * (beta * sum log(policy/ref) - A)^2 / 2,
    with w = exp(sum log(policy/behaviour)) held constant; the square is our k2. It has no probability mask."""
    case = ppo["dvo_loss"]
    logprobs, old, advantages, _, ref = tensors(case)
    label = torch.tensor(case["label_mask"]).bool()
    gain = torch.where(label, logprobs - ref, 0.0).sum(1)
    weight = torch.where(label, logprobs.detach() - old, 0.0).sum(1).exp()
    target = (advantages * label).sum(1) / label.sum(1)
    loss = (weight * kl_penalty(case["kl_coef"] * gain, target, KLEstimator.K2)).mean()
    loss.backward()
    assert weight.mean().item() == pytest.approx(case["metrics"]["actor/weight"], abs=CLOSE)
    assert gain.mean().item() == pytest.approx(case["metrics"]["actor/avg_log_ratio"], abs=CLOSE)
    assert loss.item() == pytest.approx(case["loss"], abs=CLOSE)
    assert logprobs.grad.numpy() == approx(case["grad_wrt_logprobs"])


def test_every_golden_loss_is_looked_at(ppo):
    assert len(ppo) == 8
    assert math.isclose(ppo["clip_both_signs"]["cliprange"], 0.2)
