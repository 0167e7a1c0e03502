"""The model that is trained: loading it, scoring tokens with it, and taking its weights out."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from shared.errors import ConfigError
from shared.onednn import bound_kernels
from trainer.packing import Batch

_ENTROPY_TOKENS = 1024
"""Entropies are computed for so many tokens at a time, since each takes copies of the whole vocabulary."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Formats of weights, by their names in configurations and manifests."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """What the model says about the tokens of a batch; see `packing` for the position convention."""

    logprobs: Tensor
    """[B, L] log-probability (nats) of each response token, differentiable; 0 elsewhere. float32."""
    entropy: Tensor
    """[B, L] entropy (nats) of the distribution at each participating token, detached; 0 elsewhere."""


def load_policy(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal language model from a folder or a hub id, in evaluation mode.

    Evaluation mode, because dropout would make a token's ratio differ from 1 under the very weights that
    sampled it. Gradients flow all the same.

    Raises:
        ConfigError: there is no such model, or it cannot be read.
    """
    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ConfigError(f"there is no model folder {str(path)!r}")
    bound_kernels()
    try:
        # Any, since transformers leaves `eval` and `to` untyped.
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"no model can be loaded from {str(path)!r}: {reason}") from error
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep fewer activations and compute them again in the backward pass: less memory, more time.

    Transformers does so in training mode only, so the model goes there, with every dropout at 0.
    """
    module: Any  # `attention_dropout` is the models' own, unknown to torch
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable()
    model.train()


def token_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[B, L] log-probability (nats) of each response token, 0 elsewhere; see `score`."""
    return score(model, batch, temperature).logprobs


def score(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> TokenScores:
    """Log-probabilities and entropies of the distribution that is sampled from: softmax(logits / temperature).

    The vocabulary is only ever spread over response tokens, never over prompts, context or padding. From there on
    everything is float32.

    Raises:
        ValueError: temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    wanted = batch.response.clone()
    wanted[:, 0] = False
    # Output t - 1 predicts token t.
    logits = _logits_at(model, batch.token_ids, wanted.roll(-1, dims=1)).float() / temperature
    normaliser = logits.logsumexp(-1)
    chosen = logits.gather(-1, batch.token_ids[wanted][:, None])[:, 0] - normaliser
    logprobs = torch.zeros(wanted.shape, device=chosen.device)
    logprobs = logprobs.masked_scatter(wanted, chosen)
    entropy = torch.zeros(wanted.shape, device=chosen.device)
    counted = batch.participates[wanted].nonzero()[:, 0]
    entropies = [
        _entropy(logits.detach()[counted[start : start + _ENTROPY_TOKENS]])
        for start in range(0, len(counted), _ENTROPY_TOKENS)
    ]
    if entropies:
        entropy[batch.participates & wanted] = torch.cat(entropies)
    return TokenScores(logprobs=logprobs, entropy=entropy)


def _entropy(logits: Tensor) -> Tensor:
    """[N] entropy (nats) of softmax of logits [N, V]; a logit of -inf adds nothing."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).nan_to_num(nan=0.0).sum(-1)


def _logits_at(model: PreTrainedModel, token_ids: Tensor, positions: Tensor) -> Tensor:
    """[N, V] logits at the true positions [B, L], row by row."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers' own
    with _only(head, positions) if isinstance(head, nn.Module) else nullcontext():
        # No attention mask: padding is on the right, where causal attention does not look.
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits[0] if isinstance(head, nn.Module) else logits[positions]


@contextmanager
def _only(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the output head see [1, N, H], the hidden states at the true positions, in place of all [B, L, H].

    A hook and not a call of the head by ourselves, so that what some models do around it (scaling, soft caps)
    stays the model's business.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        assert hidden.shape[:2] == positions.shape, (
            "the model cut its hidden states before the head"
        )
        return (hidden[positions][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def state_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by their names in a Hugging Face checkpoint: contiguous copies on the CPU, floats in `dtype`.

    Tied weights come once, under the name that a checkpoint has them by. Copies, so that training on does not
    change what is being published.
    """
    tied = model.all_tied_weights_keys
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = {}
    for name, value in revert_weight_conversion(model, state).items():
        kept = dtype if value.is_floating_point() else value.dtype
        tensors[name] = value.detach().to("cpu", kept, copy=True).contiguous()
    return tensors
