"""Weights by broadcast into a running vLLM: join a group, and take a version that the trainer sends to it."""

import asyncio
from typing import Any

from server.engines import vllm_weights
from server.engines.base import ApplyReport
from server.engines.vllm_process import VllmProcess, our_errors
from server.engines.vllm_weights import VllmWeights
from shared.errors import EngineError, WeightsError
from shared.transfer import TORCH_NAMES, TransferBackend, TransferGroup, TransferOffer

GRACE_S = 10.0
"""Beyond a group's own bounds, before a worker that does not answer is given up."""
RATE = 100e6
"""Bytes a second that a broadcast moves at least."""


class VllmTransfer:
    """One vLLM engine's place in a group.

    Args:
        process: vLLM, started with `weight_transfer`.
        weights: what it holds.
        backend: what it was started for.
    """

    def __init__(
        self, process: VllmProcess, weights: VllmWeights, backend: TransferBackend
    ) -> None:
        self._backend = backend
        self._process = process
        self._weights = weights
        self._group: TransferGroup | None = None

    @property
    def backend(self) -> TransferBackend:
        """Of the groups that it can join."""
        return self._backend

    @property
    def verifies(self) -> bool:
        """Can it hash what it holds?"""
        return self._weights.named

    @property
    def joined(self) -> bool:
        """Is it in a group, as far as it knows?"""
        return self._group is not None

    async def join(self, group: TransferGroup) -> None:
        """Meet the trainer and the other engines. The worker samples nothing until all are there.

        Raises:
            WeightsError: the group is of another kind.
            EngineError: not all came within `group.timeout_s`; the engine serves on.
        """
        if group.backend is not self._backend:
            raise WeightsError(
                f"backend: the group's is {group.backend}, this server's --weight-transfer {self._backend}"
            )
        self._group = None
        info = group.model_dump(mode="json")
        with our_errors():
            await self._weights.alone(
                self._bounded(
                    self._process.ask("init_weight_transfer_engine", info),
                    group.timeout_s,
                    "joining",
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
        self.check(offer)
        assert self._group is not None, "checked"
        bound_s = self._group.timeout_s + GRACE_S + offer.nbytes / RATE
        version, digest = offer.manifest.version, offer.manifest.weights_digest
        return await self._weights.exchange(version, digest, lambda: self._write(offer), bound_s)

    def check(self, offer: TransferOffer) -> None:
        """Raise WeightsError where a version could not be received now. One that is held already is taken again,
        since a server that stayed out would hold up the whole group."""
        if self._group is None:
            raise WeightsError("this server is in no transfer group: join one first")
        if offer.verify and not self.verifies:
            raise WeightsError("this model's parameters cannot be hashed by checkpoint names")
        version, digest = offer.manifest.version, offer.manifest.weights_digest
        held, same = self._weights.version, self._weights.digest in ("", digest)
        if version < held or (version == held and not same):
            raise WeightsError(f"version {version} does not follow version {held}, which is held")

    async def leave(self) -> None:
        """Leave the group; the engine serves on. The worker does so once the step that it is in has ended."""
        group, self._group = self._group, None
        bound_s = max(vllm_weights.SWAP_SECONDS, 0.0 if group is None else group.timeout_s)
        with our_errors():
            await self._weights.alone(
                self._bounded(
                    self._process.ask("shutdown_weight_transfer_engine"), bound_s, "leaving"
                )
            )

    async def _write(self, offer: TransferOffer) -> None:
        """What happens in the pause.

        Raises:
            Exception: it failed; the weights are neither the old nor the new ones.
        """
        entries = offer.manifest.tensors
        tensors = [(t.name, TORCH_NAMES[t.dtype], list(t.shape)) for t in entries]
        await self._process.ask("start_weight_update")
        await self._process.ask("update_weights", {"tensors": tensors})
        await self._process.ask("finish_weight_update")
        if offer.verify:
            await self._verify(offer)

    async def _verify(self, offer: TransferOffer) -> None:
        """Compare what the model holds now with what was announced."""
        live = await self._weights.digests_in_turn(offer.manifest.dtype)
        wrong = [t.name for t in offer.manifest.tensors if live.get(t.name) != t.sha256]
        if wrong:
            raise EngineError(f"{len(wrong)} tensors, {wrong[0]} first, are not the announced ones")

    async def _bounded(
        self,
        call: Any,  # noqa: ANN401 - any awaitable
        bound_s: float,
        doing: str,
    ) -> None:
        """A call that the worker ends by itself within a bound; one that it does not end is given up."""
        try:
            async with asyncio.timeout(bound_s + GRACE_S):
                await call
        except TimeoutError:
            reason = f"{doing} a transfer group took more than {bound_s + GRACE_S:.0f} s"
            raise self._process.give_up(f"vLLM is given up: {reason}") from None
