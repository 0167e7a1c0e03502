"""A vLLM model's parameters by checkpoint name, and vLLM's own loader as the other way to write them.

vLLM fuses some of the checkpoint's tensors (q, k and v into one, gate and up into one) and pads the vocabulary; a
*slot* is the view of vLLM's parameter that holds exactly one checkpoint tensor.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


class Loadable(nn.Module):
    """A vLLM model, as far as we use it."""

    load_weights: Callable[[Iterable[tuple[str, Tensor]]], object]


def slots(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Views of a vLLM model's parameters by checkpoint name, and names tied to another's parameter.

    Returns:
        name -> view with the checkpoint tensor's shape; tied name -> name of the parameter that it shares.
    """
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    views: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{kind}"
            if owners.setdefault(id(parameter), name) != name:
                aliases[name] = owners[id(parameter)]
                continue
            data, sizes = parameter.data, getattr(module, "output_sizes", None) or ()
            if len(packed.get(leaf, ())) == len(sizes) > 0 and sum(sizes) == len(data):
                parts = zip(packed[leaf], data.split(list(sizes)), strict=True)
                views |= {f"{parent}.{part}.{kind}": view for part, view in parts}
            else:
                # The vocabulary is padded to a multiple of 64; the padding rows stay as they are.
                views[name] = (
                    data[: getattr(module, "org_vocab_size", None)] if data.dim() else data
                )
    return views, aliases


def holds(slot: Tensor, tensor: Tensor) -> bool:
    """Whether `slot` has exactly the values of `tensor`, in its own number format."""
    return slot.shape == tensor.shape and torch.equal(slot, tensor.to(slot.device, slot.dtype))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, in the machine's memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Write a `snapshot` back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


def reloads(model: Loadable, checkpoint: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether vLLM's own loader, run again on the same checkpoint, leaves the model as it is."""
    before = snapshot(model)
    try:
        model.load_weights(checkpoint)
        if all(torch.equal(p.cpu(), before[name]) for name, p in model.named_parameters()):
            return True
    except Exception:  # a loader that cannot run twice raises as it likes; the answer is no
        pass
    restore(model, before)
    return False
