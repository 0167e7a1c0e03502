"""The connections to the servers: reused, watched, and with the token that opens the doors."""

import os
import socket
from collections.abc import Iterable

import httpx

from shared.errors import ConfigError
from trainer.client.retries import TOKEN_VARIABLE

CONNECT_S = 5.0
IDLE_S = 4.0
"""An idle connection is closed by us before uvicorn does it, after 5 s, perhaps just as we send."""


def open_http(token: str | None, keep: int) -> httpx.AsyncClient:
    """One pool of connections, without a bound on time or number: both are the caller's.

    Args:
        token: bearer token; None takes the environment variable.
        keep: most idle connections.

    Raises:
        ConfigError: the token cannot be sent.
    """
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=keep, keepalive_expiry=IDLE_S
    )
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(limits=limits, socket_options=_keep_alive()),
        headers=_authorization(token),
        timeout=httpx.Timeout(None, connect=CONNECT_S),
    )


def checked_urls(servers: str | Iterable[str]) -> list[str]:
    """The URLs, if each is one of a server.

    Raises:
        ConfigError: one is not, or carries a password, or there is none.
    """
    urls = [servers] if isinstance(servers, str) else list(servers)
    for place, url in enumerate(urls, 1):
        try:
            parts = endpoint(url)
        except httpx.InvalidURL:  # not repeated, as a password may stand in it
            raise ConfigError(
                f"servers: number {place} is none; write a URL such as http://127.0.0.1:8000"
            ) from None
        if parts.userinfo:
            raise ConfigError(
                f"server {parts.host}: leave user and password out of its URL, which stands in logs; "
                f"set {TOKEN_VARIABLE}"
            )
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(f"server {url!r}: write a URL such as http://127.0.0.1:8000")
    if not urls:
        raise ConfigError("servers: give the URL of at least one")
    return urls


def endpoint(server: str, path: str = "") -> httpx.URL:
    """The URL of what a server offers.

    Raises:
        httpx.InvalidURL: nothing can be sent there.
    """
    url = httpx.URL(server + path)
    if url.port is not None and not 0 < url.port < 1 << 16:  # else whoever connects raises anything
        raise httpx.InvalidURL(f"port {url.port} is not between 1 and 65535")
    return url


def _authorization(token: str | None) -> dict[str, str]:
    """The header that carries the token.

    Raises:
        ConfigError: no header can carry it; the message does not repeat it.
    """
    token = (os.environ.get(TOKEN_VARIABLE, "") if token is None else token).strip()
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"{TOKEN_VARIABLE}: the token has characters that no header can carry")
    return {"Authorization": f"Bearer {token}"}


def _keep_alive() -> list[tuple[int, int, int]]:
    """TCP's own probes: a machine that is gone without a word is noticed in half a minute, not at the bound."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # Linux has all three
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
