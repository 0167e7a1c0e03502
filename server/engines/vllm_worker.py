"""What runs inside vLLM's worker: new weights go into the model that is being served.

vLLM mixes `WeightLoader` into its worker class (`worker_extension_cls`), and `collective_rpc` calls its methods by
name between two engine steps. vLLM fuses some of the checkpoint's tensors (q, k and v into one, gate and up into
one) and pads the vocabulary; a *slot* is the view of vLLM's parameter that holds exactly one checkpoint tensor, so
that an update is one copy per tensor. That the slots are right is proved when the engine starts: every one must
equal the checkpoint's tensor. Models for which they are not go through vLLM's own `load_weights`.
"""

import ctypes
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import vllm._custom_ops as ops
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from vllm.model_executor.model_loader import get_model_loader

# vLLM's CPU build would pack each matrix into an opaque oneDNN handle and leave an empty parameter behind, into which
# nothing can be copied. This module is imported before the model is loaded. `spoke_open` proves that it worked.
ops._supports_onednn = False

if sys.platform == "linux":
    # PR_SET_PDEATHSIG: a server that is killed takes its engine process with it; vLLM would leave it running.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

Shapes = Mapping[str, tuple[int, ...]]


class WeightLoader:
    """Methods that `VllmEngine` calls by `collective_rpc`; `self` is vLLM's worker.

    Each returns what is wrong as a line of text, None where nothing is: vLLM would wrap an exception.
    """

    _spoke_slots: dict[str, Tensor]
    _spoke_aliases: dict[str, str]
    _spoke_direct: bool
    _spoke_shapes: Shapes

    # vLLM's worker, which this is mixed into, has these.
    get_model: Any
    model_config: Any
    load_config: Any

    def spoke_open(self) -> str | None:
        """Find the slots and prove them against the checkpoint; once, before the first request."""
        model: nn.Module = self.get_model()
        empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
        if empty:
            return f"vLLM left {len(empty)} empty parameters, {empty[0]} first: it packed its weights"
        self._spoke_slots, self._spoke_aliases = slots(model)
        checkpoint = dict(
            get_model_loader(self.load_config).get_all_weights(self.model_config, model)
        )
        self._spoke_shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
        tied = self._spoke_shapes.keys() & self._spoke_aliases.keys()
        self._spoke_shapes = {
            name: shape for name, shape in self._spoke_shapes.items() if name not in tied
        }
        self._spoke_direct = self._spoke_shapes.keys() == self._spoke_slots.keys() and all(
            holds(self._spoke_slots[name], checkpoint[name]) for name in self._spoke_slots
        )
        return None

    def spoke_ping(self) -> None:
        """Answer, between two engine steps."""

    def spoke_check(self, files: list[str]) -> str | None:
        """The first reason why these files are not this model's weights, before anything is written."""
        try:
            return misfit(self._spoke_shapes, self._spoke_aliases, files)
        except (OSError, SafetensorError) as error:
            return f"cannot read {', '.join(files)}: {error}"

    def spoke_load(self, files: list[str]) -> float:
        """Write weights that `spoke_check` passed; seconds."""
        began = time.perf_counter()
        pairs = ((n, t) for n, t in tensors(files) if n not in self._spoke_aliases)
        if self._spoke_direct:
            with torch.no_grad():
                for name, tensor in pairs:
                    self._spoke_slots[name].copy_(tensor)
        else:
            self.get_model().load_weights(pairs)
        return time.perf_counter() - began
