"""One optimizer update from an optimizer batch of segments: pack, whiten, loss, step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trainer.algorithms.base import Segment
from trainer.config import TrainerSettings
from trainer.losses import LossSums, policy_loss, total
from trainer.optimizer import PolicyOptimizer, StepReport
from trainer.packing import Batch, Row, collate, micro_batches, participating_tokens, rows
from trainer.policy import score, token_logprobs
from trainer.whiten import whiten_rows

PAD = 0
"""Any token: padding lies right of what is scored, where causal attention does not look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one update saw and did."""

    means: dict[str, float]
    """Of the loss's sums over participating tokens; see `LossSums`."""
    entropy: float
    """Mean over participating tokens, nats."""
    step: StepReport
    skipped_for: str | None
    """Why no step was taken: `ratio`, `nothing participates`, `gradient`, or None."""
    response_tokens: int
    """Tokens of the segments, masked ones included."""
    computed_tokens: int
    """Tokens that went through the model, prefixes and padding included."""


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
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    optimizer: PolicyOptimizer
    settings: TrainerSettings
    temperature: float
    mask_threshold: float | None

    def update(self, segments: Sequence[Segment]) -> UpdateReport:
        """Train once on these segments as one optimizer batch.

        No step is taken when nothing participates, when the mean importance ratio is above the limit, or when
        the gradient is not finite.
        """
        packed = rows(segments, mask_threshold=self.mask_threshold)
        if self.settings.whiten:
            packed = whiten_rows(packed)
        participating = participating_tokens(packed)
        if not participating:
            return self._report(packed, [], 0.0, 0, self.optimizer.skip(), "nothing participates")
        sums: list[LossSums] = []
        entropy, computed = 0.0, 0
        for micro in micro_batches(packed, token_budget=self.settings.token_budget):
            batch = collate(micro, PAD, self.policy.device)
            part, entropy_sum = self._backward(batch, participating)
            sums.append(part)
            entropy += entropy_sum
            computed += batch.token_ids.numel()
        if total(sums).must_skip:
            return self._report(packed, sums, entropy, computed, self.optimizer.skip(), "ratio")
        step = self.optimizer.step()
        return self._report(
            packed, sums, entropy, computed, step, "gradient" if step.skipped else None
        )

    def _backward(self, batch: Batch, participating: int) -> tuple[LossSums, float]:
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
            denominator=participating,
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            kl_coef=self.settings.kl_coef,
            ref_logprobs=reference,
            kl=self.settings.kl,
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
    ) -> UpdateReport:
        means = total(sums).means() if sums else {}
        return UpdateReport(
            means=means,
            entropy=entropy / max(1.0, means.get("tokens", 0.0)),
            step=step,
            skipped_for=skipped_for,
            response_tokens=sum(int(row.response.sum()) for row in packed),
            computed_tokens=computed,
        )
