"""A Hugging Face causal language model that runs on our own cache.

Loading finds the limits, the end tokens and the shape of the cache, and proves on a few tokens that the cached passes
give what a plain forward pass gives: what cannot be run exactly is refused at the start.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from server.engines.base import EngineInfo
from server.engines.kv import ATTENTION, RowCache, StateShape
from server.engines.settings import EngineSettings
from shared.errors import ConfigError, EngineError

_PROBE = 9
"""Tokens of the start-up probe."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Most a cached pass may differ from a plain one, relative to the largest logit."""


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
        return _tokenizer(self.info.model)


def load(settings: EngineSettings) -> LanguageModel:
    """Load and prove a checkpoint.

    Raises:
        ConfigError: no such checkpoint, device, number format, or too little memory for one sequence.
        EngineError: the model keeps a state that our cache cannot hold.
    """
    device = _device(settings)
    network = _network(settings, device)
    config = network.config.get_text_config(decoder=True)
    limit = settings.max_model_len or getattr(config, "max_position_embeddings", None)
    if limit is None:
        raise ConfigError(f"model {settings.model} states no limit: set max_model_len")
    with torch.inference_mode():
        reference, tokens, shape = _reference(network, limit)
        budget = int(settings.kv_cache_gib * 2**30 / 2)
        fits = budget // shape.token_bytes
        if fits < (settings.max_model_len or 2):
            raise ConfigError(
                f"kv_cache_gib {settings.kv_cache_gib:g} holds one sequence of {fits} tokens: raise it "
                f"or set max_model_len to at most {fits}"
            )
        model = LanguageModel(
            network=network,
            info=EngineInfo(
                engine="transformers",
                model=settings.model,
                dtype=str(network.dtype).removeprefix("torch."),
                device=str(device),
                vocab_size=config.vocab_size,
                max_model_len=min(limit, fits),
                eos_token_ids=_end_tokens(network, settings.model),
            ),
            shape=shape,
            device=device,
            cache_bytes=budget,
        )
        network.set_attn_implementation(ATTENTION)
        _prove(model, tokens, reference)
    return model


def _device(settings: EngineSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; use cpu or auto")
    return torch.device(settings.device)


def _network(settings: EngineSettings, device: torch.device) -> PreTrainedModel:
    """The model in the wanted number format, ready for inference."""
    if settings.dtype != "auto" and settings.dtype not in _DTYPES:
        raise ConfigError(f"dtype {settings.dtype}: must be auto, float32 or bfloat16")
    transformers_logging.disable_progress_bar()
    try:
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=_DTYPES.get(settings.dtype, "auto")
        )
    except (OSError, ValueError) as error:  # no such folder or id, damaged files, unknown architecture
        raise ConfigError(f"model {settings.model}: {error}") from error
    if network.dtype not in _TOLERANCE:  # float16 checkpoints, under `auto`
        network = network.float()
    network = network.to(device)
    return network.eval().requires_grad_(False)


def _end_tokens(network: PreTrainedModel, model: str) -> tuple[int, ...]:
    """End tokens from the first source that names any: generation config, config, tokenizer."""
    generation = getattr(network, "generation_config", None)
    for source in (generation, network.config):
        found: int | list[int] | None = getattr(source, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    tokenizer = _tokenizer(model)
    end = None if tokenizer is None else tokenizer.eos_token_id
    return () if end is None else (end,)


def _tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):  # a checkpoint may do without: this engine needs none
        return None
    return tokenizer


def _reference(network: PreTrainedModel, limit: int) -> tuple[Tensor, Tensor, StateShape]:
    """[T, V] logits of a plain pass over [T] probe tokens, and the shape of what it caches.

    Raises:
        EngineError: a layer's cache is not plain full attention, or layers differ.
    """
    config = network.config.get_text_config(decoder=True)
    name = type(network).__name__
    tokens = torch.arange(_PROBE, device=network.device) * 37 % config.vocab_size
    try:
        cache = DynamicCache(config=network.config)
        for layer in cache.layers:
            _check_layer(name, layer, limit)
        logits: Tensor = network(tokens[None], past_key_values=cache, use_cache=True).logits[0]
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        shapes = {tuple(state.shape) for state in states}
    except EngineError:
        raise
    except Exception as error:  # whatever an unknown architecture's code raises: it cannot be served
        raise EngineError(f"{name} cannot be run on a key-value cache: {error}") from error
    if len(shapes) != 1:
        raise EngineError(f"{name}: keys and values differ in shape, {shapes}; use --engine vllm")
    (_, heads, _, dim) = shapes.pop()
    return (
        logits,
        tokens,
        StateShape(layers=len(cache.layers), heads=heads, dim=dim, dtype=states[0].dtype),
    )


def _check_layer(name: str, layer: Any, limit: int) -> None:
    """Refuse what is not full attention over `limit` tokens."""
    if type(layer) is DynamicLayer:
        return
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.sliding_window >= limit:
            return
        raise EngineError(
            f"{name} attends over a window of {layer.sliding_window} tokens: set max_model_len to at most "
            f"that, or use --engine vllm"
        )
    raise EngineError(
        f"{name} keeps a state of kind {type(layer).__name__}, not full attention; use --engine vllm"
    )


def _prove(model: LanguageModel, tokens: Tensor, reference: Tensor) -> None:
    """Compare prefill and decode on ragged rows with a plain pass.

    Raises:
        EngineError: they differ.
    """
    name = type(model.network).__name__
    starts = torch.tensor([5, 2], device=model.device)
    rows = torch.arange(2, device=model.device)
    cache = RowCache(model.shape, 2, _PROBE + 1, model.device)
    reference = reference[:, : model.info.vocab_size].float()
    worst = torch.zeros((), device=model.device)
    try:
        columns = torch.arange(5, device=model.device)
        positions = torch.minimum(columns, starts[:, None] - 1)  # the shorter row is padded
        model.prefill(cache, rows, tokens[positions], positions, 5)
        for step in range(_PROBE - 5):
            now = starts + step
            logits = model.decode(cache, tokens[now], now, int(now.max()) + 1)
            worst = torch.maximum(worst, (logits.float() - reference[now]).abs().max())
    except Exception as error:  # whatever an unknown architecture's code raises: it cannot be served
        raise EngineError(f"{name} cannot be run on our cache: {error}") from error
    bound = _TOLERANCE[model.network.dtype] * max(1.0, float(reference.abs().max()))
    if not float(worst) <= bound:  # not a number counts as a difference
        raise EngineError(
            f"{name}: cached passes differ from a plain one by {float(worst):.2g} in the logits; "
            "use --engine vllm"
        )
