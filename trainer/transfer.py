"""The trainer's end of a transfer group: a version, broadcast into the engines of its own cluster.

A short cut for what is announced already: a server that is not in the group, or that a broadcast fails for, fetches
the same version from the store. torch is all it needs: both ends meet in a store of torch.distributed and use its
process groups (`server/engines/vllm_transfer_worker.py` has the other end).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta

import httpx
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, TCPStore

from shared.digests import sha256
from shared.errors import WeightsError
from shared.fleet import Head
from shared.transfer import TransferBackend, TransferGroup, TransferOffer, TransferTensor

JOIN = "/weight_transfer/join"
RECEIVE = "/weight_transfer/receive"
LEAVE = "/weight_transfer/leave"


def offer_of(head: Head, tensors: Mapping[str, Tensor], *, verify: bool = True) -> TransferOffer:
    """What a server must know of a version before its bytes come.

    Args:
        head: as announced.
        tensors: by checkpoint name, in the published number format, in the order of the broadcast.
        verify: see `TransferOffer`.
    """
    return TransferOffer(
        version=head.version,
        weights_digest=head.weights_digest,
        verify=verify,
        tensors=tuple(
            TransferTensor(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                sha256=sha256(
                    tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                ),
            )
            for name, tensor in tensors.items()
        ),
    )


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
        connection: ProcessGroup,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._client, self._servers, self._connection = client, tuple(servers), connection
        self._device, self._timeout_s = device, timeout_s

    async def send(self, offer: TransferOffer, tensors: Mapping[str, Tensor]) -> None:
        """Broadcast a version to every server of the group, once all are ready to receive.

        Raises:
            WeightsError: a server did not take it, or died: the group is broken and to be closed. The servers
                that did not finish end, and come back with the version from the store.
        """
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(
                    _post(
                        self._client, url + RECEIVE, offer.model_dump(mode="json"), self._timeout_s
                    )
                )
                for url in self._servers
            ]
            sent = group.create_task(asyncio.to_thread(self._broadcast, tensors))
            # A server that refuses never joins the broadcast: whoever waits for it then waits for its bound.
            await asyncio.wait([*answers, sent], return_when=asyncio.FIRST_EXCEPTION)
        faults = [fault for answer in answers if (fault := answer.result()) is not None]
        if (error := sent.result()) is not None:
            faults.append(error)
        if faults:
            raise WeightsError(f"version {offer.version} was not broadcast: {faults[0]}")

    def _broadcast(self, tensors: Mapping[str, Tensor]) -> str | None:
        try:
            for tensor in tensors.values():
                self._connection.broadcast(tensor.to(self._device).contiguous(), 0).wait()
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
        WeightsError: not every server came in time.
    """
    bound, size = timedelta(seconds=timeout_s), len(servers) + 1
    store = TCPStore(address, 0, size, is_master=True, wait_for_workers=False, timeout=bound)
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
                    timeout_s,
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
        await asyncio.gather(*(_post(client, url + LEAVE, {}, timeout_s) for url in servers))


def _open(
    store: TCPStore, backend: TransferBackend, size: int, bound: timedelta
) -> ProcessGroup | str:
    """This end of the process group, or why there is none."""
    try:
        if backend is TransferBackend.GLOO:
            return torch.distributed.ProcessGroupGloo(store, 0, size, bound)
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = bound  # noqa: SLF001 - it has no other name
        return torch.distributed.ProcessGroupNCCL(store, 0, size, options)
    except RuntimeError as error:  # what torch raises when a peer does not come
        return str(error).partition("\n")[0]


async def _post(client: httpx.AsyncClient, url: str, body: object, timeout_s: float) -> str | None:
    """Ask a server; returns why it did not, or None."""
    try:
        # Longer than the server's own bounds: its answer says more than our impatience.
        answer = await client.post(url, json=body, timeout=timeout_s + 60.0)
    except httpx.HTTPError as error:
        return f"{url}: {str(error) or type(error).__name__}"
    if answer.is_success:
        return None
    return f"{url}: {answer.status_code} {answer.text[:300]}"
