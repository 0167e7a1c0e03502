"""The trainer's end of a transfer group: a version, broadcast into the engines of its own cluster.

A short cut for what is announced already: a server that is not in the group, or that a broadcast fails for,
fetches the same version from the store. torch is all it needs: both ends meet in a store of torch.distributed and
use its process groups (`server/engines/vllm_transfer_worker.py` has the other end).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import httpx
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch exports it silently

from shared.errors import WeightsError
from shared.manifest import Manifest
from shared.transfer import TransferBackend, TransferGroup, TransferOffer

JOIN = "/weight_transfer/join"
CHECK = "/weight_transfer/check"
RECEIVE = "/weight_transfer/receive"
LEAVE = "/weight_transfer/leave"
CHECK_S = 30.0
"""Bound of a `check`: the server's own waits, and a little."""
LEAVE_S = 10.0
"""Bound of leaving, which is a courtesy: a group that is left alone ends by its own bounds."""
GRACE_S = 30.0
"""Beyond a server's own bounds: its answer says more than our impatience."""
RATE = 100e6
"""Bytes a second that a broadcast moves at least."""


class Broadcast:
    """A group of this trainer and some servers. Made by `group`.

    Args:
        client: for the servers, with a token of scope `admin`; its timeout is ours to set.
        servers: their URLs, by rank from 1 on.
        connection: the process group, this process at rank 0.
        device: where it broadcasts from.
        timeout_s: bound of one broadcast.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        servers: Sequence[str],
        connection: Any,  # noqa: ANN401 - torch gives the kinds of groups no common type
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._client, self._servers, self._connection = client, tuple(servers), connection
        self._device, self._timeout_s = device, timeout_s

    async def send(
        self, manifest: Manifest, tensors: Mapping[str, Tensor], *, verify: bool = True
    ) -> None:
        """Broadcast a version that is announced to every server of the group.

        Args:
            manifest: as announced.
            tensors: the same weights by checkpoint name, in the published number format.
            verify: see `TransferOffer`.

        Raises:
            WeightsError: a server would not or did not take it. Where the broadcast had begun the group is broken
                and to be left: servers that did not finish end, and come back with the version from the store.
        """
        offer = TransferOffer(manifest=manifest, verify=verify)
        body = offer.model_dump(mode="json")
        # All are asked before any byte goes: one that refuses later leaves the others waiting for it.
        await self._ask(CHECK, body, manifest.version, CHECK_S)
        sending = asyncio.create_task(asyncio.to_thread(self._broadcast, manifest, tensors))
        try:
            bound_s = self._timeout_s + GRACE_S + offer.nbytes / RATE
            await self._ask(RECEIVE, body, manifest.version, bound_s)
        finally:
            fault = await sending
        if fault is not None:
            raise WeightsError(f"version {manifest.version} was not broadcast: {fault}")

    async def _ask(self, path: str, body: object, version: int, bound_s: float) -> None:
        asked = (_post(self._client, url + path, body, bound_s) for url in self._servers)
        for fault in await asyncio.gather(*asked):
            if fault is not None:
                raise WeightsError(f"version {version} was not broadcast: {fault}")

    def _broadcast(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> str | None:
        """Every tensor in the manifest's order; returns what went wrong, or None."""
        try:
            for entry in manifest.tensors:
                tensor = tensors[entry.name].detach().to(self._device).contiguous()
                self._connection.broadcast(tensor, 0).wait()
        except RuntimeError as error:  # what torch raises when a peer is gone or a bound is over
            return str(error).partition("\n")[0]
        return None


@contextlib.asynccontextmanager
async def group(
    client: httpx.AsyncClient,
    servers: Sequence[str],
    *,
    backend: TransferBackend,
    address: str,
    device: torch.device,
    timeout_s: float = 60.0,
) -> AsyncIterator[Broadcast]:
    """A group with some servers, for as long as the block runs.

    Args:
        client: see `Broadcast`.
        servers: URLs.
        backend: as the servers' `--weight-transfer`.
        address: of this machine, as the servers reach it.
        device: of the tensors; a GPU for `nccl`.
        timeout_s: bound of meeting, and of each broadcast.

    Raises:
        WeightsError: not every server came in time, or the address is not of this machine.
    """
    bound, size = timedelta(seconds=timeout_s), len(servers) + 1
    store = await asyncio.to_thread(_listen, address, size, bound)
    async with asyncio.TaskGroup() as meeting:
        joined = [
            meeting.create_task(
                _post(
                    client,
                    url + JOIN,
                    TransferGroup(
                        backend=backend,
                        address=address,
                        port=store.port,
                        rank=rank,
                        size=size,
                        timeout_s=timeout_s,
                    ).model_dump(mode="json"),
                    timeout_s + GRACE_S,
                )
            )
            for rank, url in enumerate(servers, 1)
        ]
        opened = meeting.create_task(asyncio.to_thread(_open, store, backend, size, bound))
    connection = opened.result()
    faults = [fault for join in joined if (fault := join.result()) is not None]
    if isinstance(connection, str):
        faults.append(connection)
    try:
        if faults or isinstance(connection, str):
            raise WeightsError(f"no transfer group: {faults[0]}")
        yield Broadcast(client, servers, connection, device, timeout_s)
    finally:
        await asyncio.gather(*(_post(client, url + LEAVE, {}, LEAVE_S) for url in servers))


def _listen(address: str, size: int, bound: timedelta) -> TCPStore:
    try:
        return TCPStore(address, 0, size, is_master=True, wait_for_workers=False, timeout=bound)
    except RuntimeError as error:  # what torch raises when it cannot reach itself at the address
        raise WeightsError(
            f"no transfer group: transfer_address {address}: {str(error).partition('. ')[0]}"
        ) from error


def _open(store: TCPStore, backend: TransferBackend, size: int, bound: timedelta) -> Any:  # noqa: ANN401
    """This end of the process group, or in words why there is none (torch gives the kinds no common type)."""
    try:
        if backend is TransferBackend.GLOO:
            return torch.distributed.ProcessGroupGloo(store, 0, size, bound)
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = bound
        return torch.distributed.ProcessGroupNCCL(store, 0, size, options)
    except RuntimeError as error:  # what torch raises when a peer does not come
        return str(error).partition("\n")[0]


async def _post(client: httpx.AsyncClient, url: str, body: object, bound_s: float) -> str | None:
    """Ask a server; returns why it did not, or None."""
    try:
        async with asyncio.timeout(bound_s):
            answer = await client.post(url, json=body, timeout=bound_s)
    except (httpx.HTTPError, TimeoutError) as error:
        return f"{url}: {str(error) or type(error).__name__}"
    if answer.is_success:
        return None
    if answer.status_code in (401, 403):
        return f"{url}: {answer.status_code}: SPOKE_TOKEN needs scope admin there"
    return f"{url}: {answer.status_code} {_detail(answer)}"


def _detail(answer: httpx.Response) -> str:
    """What a problem document says, or the answer's beginning."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(answer.json()["detail"])
    return answer.text[:300]
