"""What runs inside vLLM's worker: new weights go into the model that is being served.

vLLM mixes `WeightLoader` into its worker class (`worker_extension_cls`), and `collective_rpc` calls its methods by
name between two engine steps. vLLM fuses some of the checkpoint's tensors (q, k and v into one, gate and up into
one) and pads the vocabulary; a *slot* is the view of vLLM's parameter that holds exactly one checkpoint tensor, so
that an update is one copy per tensor. That the slots are right is proved at the start: every one must equal the
checkpoint's tensor. A model for which they are not goes through vLLM's own loader, which must pass the same proof.
"""

import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import vllm._custom_ops as ops
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from vllm.model_executor.model_loader import get_model_loader

# vLLM's CPU build would pack each matrix into an opaque oneDNN handle and leave an empty parameter behind, into
# which nothing can be copied. This module is imported before the model is loaded; `spoke_open` checks the effect.
ops._supports_onednn = False


class Loadable(nn.Module):
    """A vLLM model, as far as we use it."""

    load_weights: Callable[[Iterable[tuple[str, Tensor]]], object]


class WeightLoader:
    """Methods that `VllmEngine` calls by `collective_rpc`; `self` is vLLM's worker."""

    _spoke_slots: dict[str, Tensor]
    _spoke_aliases: dict[str, str]
    _spoke_shapes: dict[str, tuple[int, ...]]
    _spoke_path: str

    # Of vLLM's worker, which this is mixed into.
    get_model: Any
    model_config: Any
    load_config: Any

    def spoke_open(self) -> str | None:
        """Find the slots and prove them against the checkpoint; returns why this model cannot be served, or None.

        A model that fails the proof both by slots and by vLLM's loader serves, but takes no weights.
        """
        if sys.platform == "linux":
            # PR_SET_PDEATHSIG: a server that is killed takes this process with it; vLLM would leave it running.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        model: Loadable = self.get_model()
        empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
        if empty:
            return (
                f"it packed {len(empty)} parameters, {empty[0]} first, which then take no weights"
            )
        self._spoke_slots, self._spoke_aliases = slots(model)
        loader: Any = get_model_loader(self.load_config)
        self._spoke_shapes, wrong = {}, set()
        for name, tensor in loader.get_all_weights(self.model_config, model):
            self._spoke_shapes[name] = tuple(tensor.shape)
            if name not in self._spoke_slots or not holds(self._spoke_slots[name], tensor):
                wrong.add(name)
        for alias, name in self._spoke_aliases.items():
            if name in self._spoke_shapes:
                self._spoke_shapes.pop(alias, None)
        if (
            self._spoke_slots.keys() == self._spoke_shapes.keys()
            and wrong <= self._spoke_aliases.keys()
        ):
            self._spoke_path = "slots"
        elif reloads(model, loader.get_all_weights(self.model_config, model)):
            self._spoke_path = "loader"
        else:
            self._spoke_path = "none"
        return None

    def spoke_path(self) -> str:
        """How new weights get in: `slots`, `loader` (vLLM's own), or `none`. Answers between two engine steps."""
        return self._spoke_path

    def spoke_check(self, files: list[str]) -> str | None:
        """The first reason why `files` are not weights of this model; None where they are. Writes nothing."""
        if self._spoke_path == "none":
            return "vLLM stores this model in a form that cannot take new weights"
        try:
            return misfit(self._spoke_shapes, self._spoke_aliases, files)
        except (OSError, SafetensorError) as error:
            return f"cannot read {', '.join(files)}: {error}"

    def spoke_load(self, files: list[str]) -> float:
        """Write weights that `spoke_check` passed; returns the seconds that it took."""
        began = time.perf_counter()
        fresh = ((n, t) for n, t in tensors(files) if n not in self._spoke_aliases)
        if self._spoke_path == "slots":
            with torch.no_grad():
                for name, tensor in fresh:
                    self._spoke_slots[name].copy_(tensor)
        else:
            model: Loadable = self.get_model()
            before = snapshot(model)
            try:
                model.load_weights(fresh)
            except Exception:  # whatever a model's loader raises, the old weights must serve on
                restore(model, before)
                raise
        return time.perf_counter() - began


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


def tensors(files: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some safetensors files, one at a time; all files are open before the first."""
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        for shard in shards:
            for name in shard.keys():  # noqa: SIM118 - not a mapping, it cannot be iterated
                yield name, shard.get_tensor(name)


def misfit(
    shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str], files: Iterable[str]
) -> str | None:
    """The first way in which files differ from what a model needs: a name, a shape, a broken tie."""
    found: dict[str, tuple[int, ...]] = {}
    tied: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping, it cannot be iterated
                if name in found:
                    return f"{name} appears twice"
                found[name] = tuple(opened.get_slice(name).get_shape())
                if name in aliases or name in aliases.values():
                    tied[name] = opened.get_tensor(name)
    for name in shapes:
        if name not in found:
            return f"{name} is missing"
    for name, shape in found.items():
        wanted = shapes.get(aliases.get(name, name))
        if wanted is None:
            return f"{name} is not a tensor of this model"
        if shape != wanted:
            return f"{name} has shape {list(shape)}, the model's is {list(wanted)}"
        if name in aliases and not torch.equal(tied[name], tied[aliases[name]]):
            return f"{name} differs from {aliases[name]}, which this model ties it to"
    return None
