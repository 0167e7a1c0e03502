"""Weights by broadcast into a running vLLM: join a group, and take a version that the trainer sends to all of it."""

import asyncio
from typing import Any

from server.engines.base import ApplyReport
from server.engines.vllm_process import VllmProcess, our_errors
from server.engines.vllm_weights import VllmWeights
from shared.errors import EngineError, WeightsError
from shared.transfer import TransferGroup, TransferOffer

GRACE_S = 10.0
"""Beyond a group's own bounds, before a worker that does not answer is given up."""
RATE = 100e6
"""Bytes a second that a broadcast moves at least."""


class VllmTransfer:
    """One vLLM engine's place in a group.

    Args:
        process: vLLM, started with `weight_transfer`.
        weights: what it holds.
    """

    def __init__(self, process: VllmProcess, weights: VllmWeights) -> None:
        self._process = process
        self._weights = weights
        self._group: TransferGroup | None = None

    async def join(self, group: TransferGroup) -> None:
        """Meet the trainer and the other engines. The worker samples nothing until all are there.

        Raises:
            EngineError: not all came within `group.timeout_s`; the engine serves on.
        """
        self._group = None
        info = group.model_dump(mode="json")
        with our_errors():
            await self._weights.alone(
                self._bounded(
                    self._process.ask("init_weight_transfer_engine", info), group.timeout_s
                )
            )
        self._group = group

    async def receive(self, offer: TransferOffer) -> ApplyReport:
        """Take a version from the group, between two decode steps; running requests go on with it.

        Raises:
            WeightsError: the engine is in no group, or the version does not grow; nothing was touched.
            EngineError: the transfer failed half-way, or gave other bytes than announced. The model's state is not
                known then: vLLM is given up, and the next process takes its weights from the store.
        """
        if self._group is None:
            raise WeightsError("this server is in no transfer group: join one first")
        if offer.version <= self._weights.version and self._weights.digest:
            raise WeightsError(
                f"version {offer.version} does not follow version {self._weights.version}, which is held"
            )
        size = sum(_bytes(tensor.dtype, tensor.shape) for tensor in offer.tensors)
        bound_s = self._group.timeout_s + GRACE_S + size / RATE
        return await self._weights.exchange(
            offer.version, offer.weights_digest, lambda: self._write(offer), bound_s
        )

    async def leave(self) -> None:
        """Leave the group; the engine serves on."""
        self._group = None
        with our_errors():
            await self._weights.alone(self._process.ask("shutdown_weight_transfer_engine"))

    async def _write(self, offer: TransferOffer) -> None:
        """What happens in the pause.

        Raises:
            Exception: it failed; the weights are neither the old nor the new ones.
        """
        tensors = [(t.name, t.dtype, list(t.shape)) for t in offer.tensors]
        await self._process.ask("start_weight_update")
        await self._process.ask("update_weights", {"tensors": tensors})
        await self._process.ask("finish_weight_update")
        if offer.verify:
            await self._verify(offer)

    async def _verify(self, offer: TransferOffer) -> None:
        """Compare what the model holds now with what was announced."""
        (dtype,) = {tensor.dtype for tensor in offer.tensors}
        live: dict[str, str] = await self._weights.digests_in_turn(dtype)
        wrong = [t.name for t in offer.tensors if live.get(t.name) != t.sha256]
        if wrong:
            raise EngineError(f"{len(wrong)} tensors, {wrong[0]} first, are not the announced ones")

    async def _bounded(self, call: Any, bound_s: float) -> None:  # noqa: ANN401 - any awaitable
        """A call that the worker ends by itself within a bound; one that it does not end is given up."""
        try:
            async with asyncio.timeout(bound_s + GRACE_S):
                await call
        except TimeoutError:
            reason = f"joining a transfer group took more than {bound_s + GRACE_S:.0f} s"
            raise self._process.give_up(f"vLLM is given up: {reason}") from None


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = 4 if dtype == "float32" else 2
    for side in shape:
        size *= side
    return size
