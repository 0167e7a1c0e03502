"""Servers that fetch and serve weight files, without engines: real sockets, real disks, a real Redis."""

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from support import on_a_socket

from server.advertising import Advertiser
from server.fetching import Fetcher
from server.holdings import Holdings
from server.problems import add_error_handlers
from server.weights_routes import add_weights_routes
from shared.coordination import RedisCoordinator
from shared.fleet import ServerRecord, ServerState
from shared.http_store import open_peer
from shared.open_store import open_store
from shared.sources import Sources


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One server's weights side."""

    url: str
    holdings: Holdings
    fetcher: Fetcher
    coordinator: RedisCoordinator
    advertiser: Advertiser
    sent: Counter

    @property
    def sent_bytes(self) -> float:
        return next(s.value for m in self.sent.collect() for s in m.samples if "total" in s.name)

    async def report(self) -> None:
        """Write its record, as a follower does."""
        record = ServerRecord(
            server_id=self.url, url=self.url, state=ServerState.READY, version=0, digest="", model="m",
            engine="e", serves_files=self.holdings.versions(), updated_at=0.0,
        )  # fmt: skip
        await self.coordinator.report(record)
        await self.advertiser.say()


@contextlib.asynccontextmanager
async def peer(
    folder: Path,
    redis_url: str,
    *,
    run: str,
    peers: bool = True,
    patience_s: float = 60.0,
    token: str | None = None,
) -> AsyncIterator[Peer]:
    """A server that fetches into a folder and serves what it holds."""
    registry = CollectorRegistry()
    sent = Counter("sent", "Bytes.", registry=registry)
    holdings = Holdings(folder, run)
    coordinator = RedisCoordinator(redis_url, run)
    try:
        app = FastAPI()
        add_error_handlers(app)
        add_weights_routes(app, lambda: holdings, sent)
        async with on_a_socket(app) as port:
            url = f"http://127.0.0.1:{port}"
            fetcher = Fetcher(
                holdings=holdings,
                coordinator=coordinator,
                open_store=lambda store_url: open_store(store_url, run, token=token),
                open_peer=lambda peer_url: open_peer(peer_url, run, token=token),
                store_url=None,
                url=url,
                peers=peers,
                patience_s=patience_s,
            )
            sources = Sources(coordinator=coordinator, claimant=url)
            yield Peer(
                url=url, holdings=holdings, fetcher=fetcher, coordinator=coordinator, sent=sent,
                advertiser=Advertiser(sources=sources, parts=holdings.parts),
            )  # fmt: skip
    finally:
        await coordinator.close()
        holdings.close()


@contextlib.contextmanager
def relay(target: int, cut: Callable[[bytes], int | None]) -> Iterator[int]:
    """Port of a relay to another port of this machine that cuts answers short.

    Args:
        target: port.
        cut: for a request's bytes, after how many bytes of its answer the connection is cut; None for not at all.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(near: socket.socket) -> None:
        with (
            near,
            socket.create_connection(("127.0.0.1", target)) as far,
            contextlib.suppress(OSError),
        ):
            while request := near.recv(65_536):
                left = cut(request)
                far.sendall(request)
                while data := far.recv(65_536):
                    near.sendall(data if left is None else data[:left])
                    if left is not None:
                        left -= len(data)
                        if left <= 0:
                            return

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=carry, args=(near,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
