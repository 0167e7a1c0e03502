"""What runs inside vLLM's worker where weights come by broadcast: a weight-transfer engine of our own.

vLLM's `nccl` engine meets its peer through vLLM's own classes, which a trainer would have to install. This one has
the same life (vLLM's layer-wise reload around `load_weights`) on torch.distributed's process groups, which a
trainer has; with `gloo` everything but NCCL itself runs on a CPU.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch exports it silently
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from server.engines.vllm_worker import WeightLoader

BACKEND = "spoke"
"""Name of this engine in vLLM's registry."""

__all__ = ["BACKEND", "SpokeTransferEngine", "TransferLoader"]


class TransferLoader(WeightLoader):
    """The worker's methods, from a module that registers the engine before vLLM looks for it."""


@dataclass
class SpokeInitInfo(WeightTransferInitInfo):  # type: ignore[misc] # vLLM's types are not read
    """See `shared.transfer.TransferGroup`."""

    backend: str
    address: str
    port: int
    rank: int
    size: int
    timeout_s: float


@dataclass
class SpokeUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc] # the same
    """Name, number format and shape of each tensor, in the order in which they are sent."""

    tensors: list[tuple[str, str, list[int]]]


class SpokeTransferEngine(WeightTransferEngine[SpokeInitInfo, SpokeUpdateInfo]):  # type: ignore[misc] # the same
    """Receives every tensor from rank 0 and loads it by vLLM's own loader, one at a time."""

    init_info_cls = SpokeInitInfo
    update_info_cls = SpokeUpdateInfo

    _group: Any = None
    """A process group of torch.distributed, which gives its kinds no common type."""

    def init_transfer_engine(self, init_info: SpokeInitInfo) -> None:
        """Meet the trainer; the group before, if any, is left."""
        self.shutdown()
        self._group = open_group(init_info, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Prepare every layer to be loaded again."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive, and wait until the device has it all."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.inference_mode()
    def receive_weights(self, update_info: SpokeUpdateInfo) -> None:
        """Memory is bounded by the largest tensor."""
        if self._group is None:
            raise RuntimeError("this server is in no group")
        for name, dtype, shape in update_info.tensors:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self._group.broadcast(tensor, 0).wait()
            self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        """Put the new values where the running model reads them."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def open_group(info: SpokeInitInfo, local: int) -> Any:  # noqa: ANN401 - the kinds of groups have no common type
    """A process group over a store at rank 0; `trainer/transfer.py` has the other end.

    Args:
        info: of the group.
        local: rank among the workers of this engine, which follow each other in the group.
    """
    bound = timedelta(seconds=info.timeout_s)
    store = TCPStore(info.address, info.port, info.size, is_master=False, timeout=bound)
    rank = info.rank + local
    if info.backend == "gloo":
        return torch.distributed.ProcessGroupGloo(store, rank, info.size, bound)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = bound
    return torch.distributed.ProcessGroupNCCL(store, rank, info.size, options)


WeightTransferEngineFactory.register_engine(BACKEND, SpokeTransferEngine)
