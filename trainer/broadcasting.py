"""Versions by broadcast to the servers of the trainer's own cluster, whoever of them is there; see `transfer`.

    version in the store -> meet: a group with the live servers that take broadcasts -> announcement -> send

The store is the truth. Whatever fails here ends the group and costs a line; the servers then fetch that version,
and the next one is broadcast again to those that are there by then. Every wait has a bound.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

import httpx
import torch
from torch import Tensor

from shared.errors import ConfigError, CoordinationError, WeightsError
from shared.fleet import ServerRecord
from shared.manifest import Manifest
from shared.transfer import TransferBackend
from trainer.client.connection import open_http
from trainer.config import TrainSettings
from trainer.patience import Servers
from trainer.transfer import Broadcast, group

MOST_REST = 31
"""Most versions in a row that go by the store alone after broadcasts that failed."""


def rest_after(faults: int) -> int:
    """Versions that are not broadcast after so many failures in a row, since trying costs time as well.

    >>> [rest_after(faults) for faults in (1, 2, 3, 4, 100)]
    [0, 1, 3, 7, 31]
    """
    return min(MOST_REST, (1 << min(faults - 1, 20)) - 1)


class Broadcasting:
    """Broadcasts the versions of one run. Made by `broadcasting`; one call at a time.

    Args:
        servers: lists the live servers.
        client: for them, with a token of scope `admin`.
        backend: of the group; servers of another one take no part.
        address: of this machine, as servers reach it.
        device: that is broadcast from.
        timeout_s: bound of meeting, and of each broadcast.
        tell: shows a line that stays.
    """

    def __init__(
        self,
        *,
        servers: Servers,
        client: httpx.AsyncClient,
        backend: TransferBackend,
        address: str,
        device: torch.device,
        timeout_s: float,
        tell: Callable[[str], None],
    ) -> None:
        self._servers, self._client, self._tell = servers, client, tell
        self._backend, self._address, self._device = backend, address, device
        self._timeout_s = timeout_s
        self._group: Broadcast | None = None
        self._leave = contextlib.AsyncExitStack()
        self._members: tuple[tuple[str, str], ...] = ()
        """(id, URL) of each server in the group; one that started again is another one."""
        self._faults = self._rest = 0

    async def meet(self) -> None:
        """Have a group with the servers that take broadcasts now, if there are any. Raises nothing.

        Before a version is announced: servers in a group wait a moment for the broadcast of what they hear of.
        """
        if self._rest > 0:
            self._rest -= 1
            return
        try:
            records = await self._servers()
        except CoordinationError:
            return  # the group of before may do
        members = tuple(sorted((r.server_id, r.url) for r in records if self._suits(r)))
        if members == self._members:
            return
        await self.close()
        if not members:
            return
        entered = group(
            self._client,
            [url for _, url in members],
            backend=self._backend,
            address=self._address,
            device=self._device,
            timeout_s=self._timeout_s,
        )
        try:
            self._group = await self._leave.enter_async_context(entered)
            self._members = members
        except WeightsError as error:
            await self._failed(str(error))

    async def send(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> bool:
        """Broadcast a version that is announced to the group; whether it took it. Raises nothing.

        Args:
            manifest: as announced.
            tensors: the same weights by checkpoint name, in the published number format.
        """
        if self._group is None:
            return False
        try:
            await self._group.send(manifest, tensors)
        except WeightsError as error:
            await self._failed(str(error))
            return False
        self._faults = 0
        return True

    async def close(self) -> None:
        """Leave the group; its servers follow the store."""
        self._group, self._members = None, ()
        await self._leave.aclose()

    def _suits(self, record: ServerRecord) -> bool:
        return record.state.serves and record.transfer is self._backend

    async def _failed(self, reason: str) -> None:
        await self.close()
        self._faults += 1
        self._rest = rest_after(self._faults)
        after = f"; the next {self._rest} versions too" if self._rest else ""
        self._tell(f"{reason}; the servers take it from the store{after}")


@contextlib.asynccontextmanager
async def broadcasting(
    settings: TrainSettings, servers: Servers, tell: Callable[[str], None]
) -> AsyncIterator[Broadcasting | None]:
    """What broadcasts a run's versions while the block runs; None where the settings ask for none.

    Args: see `Broadcasting`.

    Raises:
        ConfigError: this machine cannot, or the token in SPOKE_TOKEN cannot be sent.
    """
    fleet = settings.fleet
    if fleet.weight_transfer == "none":
        yield None
        return
    assert fleet.transfer_address is not None, "settings check it"
    backend = TransferBackend(fleet.weight_transfer)
    device = torch.device("cpu")
    if backend is TransferBackend.NCCL:
        if not torch.cuda.is_available():
            raise ConfigError(
                "fleet.weight_transfer: nccl needs a GPU at the trainer, and none is here"
            )
        own = settings.model.device
        device = torch.device(own if own.startswith("cuda") else "cuda")
    async with open_http(None, keep=16) as client:
        made = Broadcasting(
            servers=servers,
            client=client,
            backend=backend,
            address=fleet.transfer_address,
            device=device,
            timeout_s=fleet.transfer_s,
            tell=tell,
        )
        try:
            yield made
        finally:
            await made.close()
