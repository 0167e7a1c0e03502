"""Loading a checkpoint so that it samples exactly, or not at all.

Loading finds the limits, the end tokens and the shape of the cache, and proves on a few tokens that the cached
passes give what a plain forward pass gives: what cannot be run exactly is refused at the start.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from server.engines.base import EngineInfo
from server.engines.kv import ATTENTION, RowCache, StateShape
from server.engines.model import LanguageModel, load_tokenizer
from server.engines.settings import EngineSettings
from shared.errors import ConfigError, EngineError

_PROBE = 9
"""Tokens of the start-up probe."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Most a cached pass may differ from a plain one, relative to the largest logit."""


def load(settings: EngineSettings) -> LanguageModel:
    """Load and prove a checkpoint.

    Raises:
        ConfigError: no such checkpoint, device, number format, or too little memory for one sequence.
        EngineError: the model keeps a state that our cache cannot hold.
    """
    device = _device(settings)
    network = _network(settings, device)
    config = network.config.get_text_config(decoder=True)
    limit = _limit(settings, getattr(config, "max_position_embeddings", None))
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
                eos_token_ids=tuple(
                    e for e in _end_tokens(network, settings.model) if e < config.vocab_size
                ),
                max_batch=settings.max_batch,
                kv_tokens=fits,
                block_tokens=1,
            ),
            shape=shape,
            device=device,
            cache_bytes=budget,
        )
        network.set_attn_implementation(ATTENTION)
        _prove(model, tokens, reference)
    return model


def _limit(settings: EngineSettings, own: int | None) -> int:
    """Most tokens of a sequence, given the model's own limit."""
    asked = settings.max_model_len
    if own is None and asked is None:
        raise ConfigError(f"model {settings.model} states no limit: set max_model_len")
    if own is not None and asked is not None and asked > own:
        raise ConfigError(f"max_model_len {asked}: the model was made for at most {own}")
    limit = asked or own
    if limit is None or limit < 2:
        raise ConfigError(f"max_model_len {limit}: a prompt and a response need 2 tokens")
    return limit


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
    if settings.model.startswith((".", "/")) and not Path(settings.model).is_dir():
        raise ConfigError(f"model {settings.model}: no such folder")  # and surely no hub id
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=_DTYPES.get(settings.dtype, "auto")
        )
    # No such id, an unknown architecture, damaged files, tensors of other shapes.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"model {settings.model}: {reason}") from error
    if network.dtype not in _TOLERANCE:  # float16 checkpoints, under `auto`
        network = network.float()
    ready: PreTrainedModel = network.to(device).eval().requires_grad_(False)
    return ready


def _end_tokens(network: PreTrainedModel, model: str) -> tuple[int, ...]:
    """End tokens from the first source that names any: generation config, config, tokenizer."""
    generation = getattr(network, "generation_config", None)
    for source in (generation, network.config):
        found: int | list[int] | None = getattr(source, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    tokenizer = load_tokenizer(model)
    end = None if tokenizer is None else tokenizer.eos_token_id
    return () if end is None else (end,)


def _reference(network: PreTrainedModel, limit: int) -> tuple[Tensor, Tensor, StateShape]:
    """[T, V] logits of a plain pass over [T] probe tokens, and the shape of what it caches.

    Raises:
        EngineError: a layer's cache is not plain full attention, or layers differ.
    """
    config = network.config.get_text_config(decoder=True)
    name = type(network).__name__
    tokens = torch.arange(_PROBE, device=network.device) * 37 % config.vocab_size
    try:
        cache: Any = DynamicCache(config=network.config)
        for layer in cache.layers:
            _check_layer(name, layer, limit)
        logits: Tensor = network(tokens[None], past_key_values=cache, use_cache=True).logits[0]
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        shapes = {tuple(state.shape) for state in states}
    except EngineError:
        raise
    except (
        Exception
    ) as error:  # whatever an unknown architecture's code raises: it cannot be served
        raise EngineError(f"{name} cannot be run on a key-value cache: {error}") from error
    if len(shapes) != 1:
        raise EngineError(f"{name}: keys and values differ in shape, {shapes}; use --engine vllm")
    (_, heads, _, dim) = shapes.pop()
    return (
        logits,
        tokens,
        StateShape(layers=len(cache.layers), heads=heads, dim=dim, dtype=states[0].dtype),
    )


def _check_layer(name: str, layer: object, limit: int) -> None:
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
    except (
        Exception
    ) as error:  # whatever an unknown architecture's code raises: it cannot be served
        raise EngineError(f"{name} cannot be run on our cache: {error}") from error
    bound = _TOLERANCE[model.network.dtype] * max(1.0, float(reference.abs().max()))
    if not float(worst) <= bound:  # not a number counts as a difference
        raise EngineError(
            f"{name}: cached passes differ from a plain one by {float(worst):.2g} in the logits; "
            "use --engine vllm"
        )
