"""One optimizer update from an optimizer batch of segments: pack, whiten, loss, step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trainer.algorithms.base import Segment
from trainer.averaging import denominators, weights
from trainer.critic import Critic, CriticReport
from trainer.losses import LossSums, OffPolicy, policy_loss, total
from trainer.optimizer import PolicyOptimizer, StepReport
from trainer.packing import (
    PAD,
    Batch,
    Row,
    collate,
    micro_batches,
    needed,
    participating_tokens,
    rows,
)
from trainer.policy import score, token_logprobs
from trainer.proximal import Proximal, rows_with, score_proximal
from trainer.settings import TrainerSettings, Whitening
from trainer.whiten import whiten_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one update saw and did."""

    means: dict[str, float]
    """Of the loss's sums over participating tokens; see `LossSums`."""
    entropy: float
    """Mean over participating tokens, nats."""
    step: StepReport
    skipped_for: str | None
    """Why no step was taken: `ratio`, `nothing participates`, `gradient`, `critic`, or None."""
    response_tokens: int
    """Tokens of the segments, masked ones included."""
    computed_tokens: int
    """Tokens that went through the model, prefixes and padding included."""
    critic: CriticReport | None
    """Of PPO's critic; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Policy, reference and optimizer.

    Args:
        policy: the model that is trained.
        reference: the frozen one that KL is taken to; None for no KL.
        optimizer: steps the policy.
        settings: of the update.
        temperature: that the segments were sampled at.
        mask_threshold: rho of the probability mask; None for none.
        max_tokens: bound of a response, which `average = "constant"` divides by.
        critic: PPO's; None for every other algorithm.
        off_policy: corrects for tokens that older weights sampled; None in synchronous training.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    optimizer: PolicyOptimizer
    settings: TrainerSettings
    temperature: float
    mask_threshold: float | None
    max_tokens: int
    critic: Critic | None = None
    off_policy: OffPolicy | None = None

    def proximal(self, segments: Sequence[Segment]) -> Proximal | None:
        """What the policy says now of all that a step trains; None where the step's updates do not ask for it."""
        if self.off_policy is None or self.settings.updates_per_iteration == 1:
            return None
        return score_proximal(
            self.policy,
            segments,
            mask_threshold=self.mask_threshold,
            temperature=self.temperature,
            token_budget=self.settings.token_budget,
        )

    def update(self, segments: Sequence[Segment], proximal: Proximal | None = None) -> UpdateReport:
        """Train once on these segments as one optimizer batch, the critic too where there is one.

        Args:
            segments: whole trees' shares of the step's.
            proximal: of the whole step, from before its first update; None where this is its only one.

        The policy takes no step when nothing participates, when the mean importance ratio is above the limit, when
        the gradient is not finite, or while the critic warms up.
        """
        if proximal is None:
            packed = rows(segments, mask_threshold=self.mask_threshold)
        else:
            packed = rows_with(segments, proximal, mask_threshold=self.mask_threshold)
        critic = None
        if self.critic is not None and packed:
            critic = self.critic.update(packed)
            if self.critic.warming_up:
                return self._report(packed, [], 0.0, 0, self.optimizer.skip(), "critic", critic)
        if self.settings.whiten is Whitening.BATCH:
            packed = whiten_rows(packed)
        if not participating_tokens(packed):
            skip = self.optimizer.skip()
            return self._report(packed, [], 0.0, 0, skip, "nothing participates", critic)
        sums, entropy, computed = self._gradient(packed, scored=proximal is not None)
        if not total(sums).weight:  # the correction has masked every token
            skip = self.optimizer.skip()
            return self._report(
                packed, sums, entropy, computed, skip, "nothing participates", critic
            )
        if total(sums).must_skip:
            skip = self.optimizer.skip()
            return self._report(packed, sums, entropy, computed, skip, "ratio", critic)
        step = self.optimizer.step()
        reason = "gradient" if step.skipped else None
        return self._report(packed, sums, entropy, computed, step, reason, critic)

    def follow(self, share: float) -> None:
        """Let the learning rates follow the share of a budget that is spent, at most 1, and not counted steps."""
        for optimizer in (self.optimizer, *([self.critic.optimizer] if self.critic else [])):
            if share > 0:
                optimizer.total_steps = max(optimizer.steps + 1, round(optimizer.steps / share))

    def _gradient(
        self, packed: Sequence[Row], *, scored: bool
    ) -> tuple[list[LossSums], float, int]:
        """Add the batch's gradient; (sums of each micro-batch, sum of entropies, positions computed)."""
        micros = micro_batches(needed(packed), token_budget=self.settings.token_budget)
        divide = denominators(
            micros, self.settings.average, rows=len(packed), max_tokens=self.max_tokens
        )
        sums: list[LossSums] = []
        entropy, computed = 0.0, 0
        for micro, denominator in zip(micros, divide, strict=True):
            if self.settings.whiten is Whitening.MICRO_BATCH:
                micro = whiten_rows(micro)
            batch = collate(micro, PAD, self.policy.device)
            part, entropy_sum = self._backward(batch, denominator, scored=scored)
            sums.append(part)
            entropy += entropy_sum
            computed += batch.token_ids.numel()
        return sums, entropy, computed

    def _backward(
        self, batch: Batch, denominator: float, *, scored: bool
    ) -> tuple[LossSums, float]:
        """Add one micro-batch's gradient; (its sums, its sum of entropies)."""
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = token_logprobs(self.reference, batch, self.temperature)
        scores = score(self.policy, batch, self.temperature)
        result = policy_loss(
            scores.logprobs,
            batch.behaviour_logprobs,
            batch.advantages,
            batch.participates,
            denominator=denominator,
            weights=weights(batch.participates, self.settings.average),
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            kl_coef=self.settings.kl_coef,
            ref_logprobs=reference,
            kl=self.settings.kl,
            off_policy=self.off_policy,
            proximal_logprobs=batch.proximal_logprobs if scored else None,
        )
        result.loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return result.sums, float(scores.entropy.sum())

    def _report(
        self,
        packed: Sequence[Row],
        sums: Sequence[LossSums],
        entropy: float,
        computed: int,
        step: StepReport,
        skipped_for: str | None,
        critic: CriticReport | None,
    ) -> UpdateReport:
        means = total(sums).means() if sums else {}
        return UpdateReport(
            means=means,
            entropy=entropy / max(1.0, means.get("tokens", 0.0)),
            step=step,
            skipped_for=skipped_for,
            response_tokens=sum(int(row.response.sum()) for row in packed),
            computed_tokens=computed,
            critic=critic,
        )
