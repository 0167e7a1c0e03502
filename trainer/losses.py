"""The policy loss: PPO-clip with a KL penalty, as sums that do not care how a batch is cut.

    ratio    = exp(clamp(logprob - behaviour logprob, -10, 10))
    token    = max(-A * ratio, -A * clamp(ratio, 1 - clip_low, 1 + clip_high)) + beta * KL(token)
    loss     = sum of token over the participating tokens / denominator

The denominator is the count of participating tokens of the whole optimizer batch, so the gradients of its
micro-batches add up to the gradient of the batch however it is cut (DESIGN section 4; PPO arXiv 1707.06347,
equation 7).

Where other weights sampled the tokens than those a step starts from (asynchronous training), two things are told
apart that PPO has in one ratio: the policy at the step's start, to which the update stays close (proximal), and
the one that sampled (behaviour). It is the decoupled objective (arXiv 2110.00641; AReaL, arXiv 2505.24298):

    w        = exp(clamp(proximal logprob - behaviour logprob, -10, 10)), no gradient
    ratio    = exp(clamp(logprob - proximal logprob, -10, 10))
    loss     = sum of weight(w) * token / denominator

    truncated  weight(w) = min(w, C)                  as V-trace's rho (IMPALA, arXiv 1802.01561); "TIS"
    masked     weight(w) = w if 1/C <= w <= C else 0  as IcePop: a token that moved too far leaves the loss

Without a correction the ratio is to the behaviour policy and weight is 1. The weight is of the whole token, KL
included, for both are expectations under the policy. The denominator stays the count of participating tokens,
whatever they weigh: dividing by the weights' sum would give back what truncation takes, and a masked token would
make the others count for more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
from torch import Tensor

from trainer.settings import Correction, KLEstimator

LOG_RATIO_LIMIT = 10.0
"""Log-ratios are clamped to [-10, 10]; outside, a token has no gradient."""
MAX_MEAN_RATIO = 10.0
"""An optimizer batch whose mean ratio is above this is skipped: no step is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over participating tokens, detached, 0-d tensors; they add up over micro-batches and processes."""

    tokens: Tensor
    """How many tokens took part."""
    objective: Tensor
    """The PPO-clip term of the loss."""
    ratio: Tensor
    """exp of the clamped log-ratio: to the proximal policy under a correction, else to the behaviour policy."""
    clipped: Tensor
    """Tokens where the clipped term was the larger, so that they had no gradient."""
    kl: Tensor
    """The KL estimate to the reference, before beta."""
    log_ratio: Tensor
    """logprob - behaviour logprob, clamped; its negative estimates KL(behaviour | policy)."""
    approx_kl: Tensor
    """log-ratio squared over 2: a KL(behaviour | policy) that is never negative."""
    mismatch: Tensor
    """|logprob - behaviour logprob|, not clamped: on fresh data, the engines' disagreement (nats)."""
    weight: Tensor
    """What each token weighs for being sampled by another policy; 1 without a correction."""
    limited: Tensor
    """Tokens whose weight was truncated or masked."""

    def __add__(self, other: Self) -> Self:
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return type(self)(**added)

    def means(self) -> dict[str, float]:
        """The mean of each sum by its name, and `tokens` itself; zeros where nothing took part."""
        tokens = float(self.tokens)
        means = {f.name: float(getattr(self, f.name)) / max(tokens, 1.0) for f in fields(self)}
        return means | {"tokens": tokens}

    @property
    def must_skip(self) -> bool:
        """True if the mean ratio is above the limit: ask it of the whole optimizer batch's sums."""
        return self.means()["ratio"] > MAX_MEAN_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The loss of one micro-batch."""

    loss: Tensor
    """0-d, differentiable: this micro-batch's share of the batch's loss."""
    sums: LossSums


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicy:
    """How tokens are corrected that another policy sampled."""

    correction: Literal[Correction.TRUNCATED, Correction.MASKED]
    limit: float
    """C, above 1."""

    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weight of each token, whether it was limited), from proximal logprob - behaviour logprob.

        >>> OffPolicy(correction=Correction.MASKED, limit=2.0).weights(torch.tensor([0.0, 1.0, -1.0]))
        (tensor([1., 0., 0.]), tensor([False,  True,  True]))
        """
        weight = log_weights.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        if self.correction is Correction.TRUNCATED:
            return weight.clamp(max=self.limit), weight > self.limit
        far = (weight > self.limit) | (weight < 1 / self.limit)
        return weight.masked_fill(far, 0.0), far


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    participates: Tensor,
    *,
    denominator: float,
    weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl: KLEstimator = KLEstimator.K3,
    off_policy: OffPolicy | None = None,
    proximal_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """Loss and sums of one micro-batch; see the module.

    Positions that do not take part may hold anything, NaN included: they add nothing and get a zero gradient.
    If none takes part, the loss is a zero with zero gradients.

    Args:
        logprobs: [...] log-probability (nats) of each token now, differentiable.
        behaviour_logprobs: [...] the same when it was sampled.
        advantages: [...] advantage of each token.
        participates: [...] true at the tokens that take part.
        denominator: participating tokens of the whole optimizer batch (or see `averaging`); 0 counts as 1.
        weights: [...] weight of each token in the loss, KL included; None is 1.
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        kl_coef: beta, weight of the KL penalty.
        ref_logprobs: [...] log-probability under the reference model; None for no penalty.
        kl: estimator of the penalty.
        off_policy: corrects for the behaviour policy; None takes the ratio to it.
        proximal_logprobs: [...] log-probability at the start of the step, detached, for the correction; None where
            this is the step's first update, so that they are `logprobs`.
    """
    # Selecting before any arithmetic: a mask that multiplies would turn inf and NaN elsewhere into NaN here.
    logprobs, behaviour_logprobs = logprobs[participates], behaviour_logprobs[participates]
    advantages = advantages[participates]
    difference = logprobs - behaviour_logprobs
    log_ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, corrected = log_ratio.exp(), None
    if off_policy is not None:
        proximal = logprobs.detach()
        if proximal_logprobs is not None:
            proximal = proximal_logprobs[participates]
        ratio = (logprobs - proximal).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        corrected = off_policy.weights(proximal - behaviour_logprobs)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.maximum(plain, clipped)
    if ref_logprobs is None:
        penalty = torch.zeros_like(objective)
    else:
        penalty = kl_penalty(logprobs, ref_logprobs[participates], kl)
    losses = objective + kl_coef * penalty
    if corrected is not None:
        losses = losses * corrected[0]
    if weights is not None:
        losses = losses * weights[participates]
    loss = losses.sum() / max(denominator, 1.0)
    with torch.no_grad():
        sums = LossSums(
            tokens=participates.sum(),
            objective=objective.sum(),
            ratio=ratio.sum(),
            clipped=(clipped > plain).sum(),
            kl=penalty.sum(),
            log_ratio=log_ratio.sum(),
            approx_kl=log_ratio.square().sum() / 2,
            mismatch=difference.abs().sum(),
            weight=participates.sum() if corrected is None else corrected[0].sum(),
            limited=torch.zeros_like(objective).sum() if corrected is None else corrected[1].sum(),
        )
    return PolicyLoss(loss=loss, sums=sums)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kl: KLEstimator) -> Tensor:
    """[...] KL estimate of each token (nats); see `KLEstimator`."""
    difference = ref_logprobs - logprobs
    match kl:
        case KLEstimator.NONE:
            return torch.zeros_like(difference)
        case KLEstimator.K1:
            return -difference
        case KLEstimator.K2:
            return difference.square() / 2
        case KLEstimator.K3:
            difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            return difference.exp() - difference - 1


def total(sums: Iterable[LossSums]) -> LossSums:
    """The sums of a batch from those of its micro-batches, at least one."""
    first, *rest = sums
    for more in rest:
        first = first + more
    return first


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """[...] loss of a critic at each token: half the squared error, the larger of clipped and plain.

        max((V - return)^2, (V_old + clamp(V - V_old, -clip, clip) - return)^2) / 2

    As in PPO's published code (arXiv 1707.06347 has the policy's clip alone).

    Args:
        values: [...] the critic's value before each token now, differentiable.
        old_values: [...] the same when the advantages were made.
        returns: [...] what it should have said.
        clip: how far from the old value an update may profit; None does not clip.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (near - returns).square()) / 2
