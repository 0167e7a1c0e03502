"""Addresses that a server binds to."""

import ipaddress
import socket
import sys

UNREAD_S = 60
"""How long a peer may take no byte, seconds; then the kernel ends its connection."""


def is_loopback(host: str) -> bool:
    """Does a server that binds to `host` listen to this machine alone? A name counts as no.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`.

    >>> host_and_port("0.0.0.0:8100"), host_and_port("[::1]:0")
    (('0.0.0.0', 8100), ('::1', 0))

    Raises:
        ValueError: it is nothing of that form.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    digits = port.isascii() and port.isdigit()
    if not (colon and host and "/" not in host and digits and int(port) <= 65_535):
        raise ValueError(f"{text!r}: write HOST:PORT, such as 0.0.0.0:8100")
    return host, int(port)


def listening(host: str, port: int, unread_s: float = UNREAD_S) -> socket.socket:
    """A listening socket.

    Args:
        host: to listen at.
        port: 0 takes a free one.
        unread_s: how long a peer may take no byte, where the system can tell (Linux). An answer that is given up
            would else keep its connection, which is closed only when the peer has read what was sent before.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    if sys.platform == "linux":  # what it accepts inherits it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_s * 1000))
    return listener
