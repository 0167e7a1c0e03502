"""A Hugging Face causal language model on our own cache: the two passes that sampling needs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from server.engines.base import EngineInfo
from server.engines.kv import RowCache, StateShape
from shared.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A loaded model; use it from one thread."""

    network: PreTrainedModel
    info: EngineInfo
    shape: StateShape
    device: torch.device
    cache_bytes: int
    """Most bytes of keys and values of running rows; one row of `max_model_len` fits."""

    def decode(self, cache: RowCache, tokens: Tensor, positions: Tensor, extent: int) -> Tensor:
        """One token for each of the first N rows of the cache.

        Args:
            cache: holds all positions before `positions`; gets the tokens' own keys and values.
            tokens: [N] int64.
            positions: [N] int64 position of each token in its row.
            extent: columns to attend over: more than the largest position.

        Returns:
            [N, V] logits of the tokens that follow.
        """
        positions = positions[:, None]
        output = self.network(
            input_ids=tokens[:, None],
            position_ids=positions,
            attention_mask=cache.aim(positions, extent),
            past_key_values=cache,
            use_cache=True,
        )
        # A model may pad its vocabulary; such tokens do not exist.
        logits: Tensor = output.logits[:, -1, : self.info.vocab_size]
        return logits

    def prefill(
        self, cache: RowCache, rows: Tensor, tokens: Tensor, positions: Tensor, extent: int
    ) -> None:
        """Compute keys and values of [N, Q] tokens at [N, Q] positions of [N] rows."""
        self.network.base_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=cache.aim(positions, extent, rows),
            past_key_values=cache,
            use_cache=True,
        )

    def answers(self) -> None:
        """Run one token through the model.

        Raises:
            EngineError: the logits are not finite.
        """
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        cache = RowCache(self.shape, 1, 1, self.device)
        if not self.decode(cache, zero, zero, 1).isfinite().all():
            raise EngineError("the model gives logits that are not finite: push sound weights")

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, read anew; None where it has none."""
        return load_tokenizer(self.info.model)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """A checkpoint's tokenizer; None where it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):  # a checkpoint may do without: this engine needs none
        return None
    return tokenizer
