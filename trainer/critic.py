"""PPO's critic: a value head on a language model of its own, and its update.

The body starts from the policy's checkpoint, the head from zero, so that the first advantages are the rewards
themselves. It learns from every response token, whatever the policy's mask leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.utils import logging

from shared.errors import ConfigError
from trainer.algorithms.base import AlgorithmSettings, Segment, TokenTargets
from trainer.algorithms.ppo import gae
from trainer.losses import value_loss
from trainer.optimizer import PolicyOptimizer
from trainer.packing import PAD, Batch, Row, collate, micro_batches, rows
from trainer.settings import CriticSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticReport:
    """What one update of the critic saw and did."""

    loss: float
    """Mean over response tokens, before the step."""
    explained_variance: float
    """1 - Var(return - V_old) / Var(return): 1 is a perfect critic, 0 one that knows the mean alone."""
    gradient_norm: float


def load_critic(
    path: str | Path, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """A critic from a checkpoint: of a critic, or of a language model, whose head is then zero.

    Raises:
        ConfigError: the checkpoint's kind of model has no head for single tokens.
    """
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # it would warn that the head is new, which is what we want
    try:
        model: Any  # transformers leaves `eval` and `to` untyped
        model, info = AutoModelForTokenClassification.from_pretrained(
            str(path), dtype=dtype, num_labels=1, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"critic: no critic can be made from {str(path)!r}: {reason}") from error
    finally:
        logging.set_verbosity(before)
    with torch.no_grad():
        for name in info["missing_keys"]:
            model.get_parameter(name).zero_()
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """Gives responses token-level advantages, and learns.

    Args:
        model: its output [B, L, 1] at a position is the value of the state after that position's token.
        optimizer: steps it.
        settings: of the critic.
        token_budget: most tokens of a micro-batch, padding included.
        warmup_updates: its first so many updates, in which the policy waits.
    """

    model: PreTrainedModel
    optimizer: PolicyOptimizer
    settings: CriticSettings
    token_budget: int
    warmup_updates: int = 0

    @property
    def warming_up(self) -> bool:
        """True while the policy waits for it."""
        return self.optimizer.steps <= self.warmup_updates

    def estimate(self, responses: Sequence[Segment], algorithm: AlgorithmSettings) -> list[Segment]:
        """The responses with advantages, values and returns of each token; see `algorithms.ppo`."""
        # Row by row, so that they stand in the order of the responses.
        packed = [row for one in responses for row in rows([one], mask_threshold=None)]
        known = self.values(packed)
        scored = []
        for segment, row, values in zip(responses, packed, known, strict=True):
            advantages, returns = gae(
                values[row.response],
                segment.advantage,
                gamma=algorithm.gamma,
                lam=algorithm.gae_lambda,
            )
            targets = TokenTargets(
                advantages=advantages, values=values[row.response], returns=returns
            )
            scored.append(replace(segment, advantage=float(advantages.mean()), tokens=targets))
        return scored

    @torch.no_grad()
    def values(self, packed: Sequence[Row]) -> list[NDArray[np.float64]]:
        """[R] arrays [L]: the value before each token of each row, in the order given."""
        places = {id(row): place for place, row in enumerate(packed)}
        found: list[NDArray[np.float64]] = [np.zeros(0)] * len(packed)
        for micro in micro_batches(packed, token_budget=self.token_budget):
            values = self._forward(collate(micro, PAD, self.model.device)).double().cpu().numpy()
            for row, own in zip(micro, values, strict=True):
                found[places[id(row)]] = own[: len(row)]
        return found

    def update(self, packed: Sequence[Row]) -> CriticReport:
        """One optimizer step on every response token of these rows."""
        tokens = sum(int(row.response.sum()) for row in packed)
        loss = 0.0
        for micro in micro_batches(packed, token_budget=self.token_budget):
            batch = collate(micro, PAD, self.model.device)
            wanted = batch.response
            losses = value_loss(
                self._forward(batch)[wanted],
                batch.values[wanted],
                batch.returns[wanted],
                self.settings.value_clip,
            )
            share = losses.sum() / max(1, tokens)
            share.backward()  # type: ignore[no-untyped-call]  # torch's own
            loss += float(share.detach())
        step = self.optimizer.step()
        returns = np.concatenate([row.returns[row.response] for row in packed])
        errors = returns - np.concatenate([row.values[row.response] for row in packed])
        variance = float(returns.var())
        return CriticReport(
            loss=loss,
            explained_variance=1 - float(errors.var()) / variance if variance > 0 else 0.0,
            gradient_norm=step.gradient_norm,
        )

    def _forward(self, batch: Batch) -> Tensor:
        """[B, L] value before each token, float32; position 0 has nothing before it and gets 0."""
        after: Tensor = self.model(input_ids=batch.token_ids, use_cache=False).logits[..., 0]
        return torch.nn.functional.pad(after.float()[:, :-1], (1, 0))
