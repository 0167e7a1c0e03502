"""`spoke store ROOT`: a weight store's folder over HTTP, until told to stop."""

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from shared.addresses import is_loopback, listening
from shared.errors import ConfigError
from shared.store_url import VARIABLE, store_token
from trainer.file_server import create_app

log = logging.getLogger("spoke.store")

CONNECTIONS = 512
"""Most at once; the next is answered 503, and comes again."""
END_S = 3
"""How long files on their way may take after a stop, seconds: a reader goes on where it was cut."""


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop.

    Raises:
        ConfigError: the folder, the address or the token cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    root: Path = args.root
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    token = token_for(args.auth, args.host)
    try:
        listener = listening(args.host, args.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--host {args.host} --port {args.port}: {reason}") from None
    config = uvicorn.Config(
        create_app(root, token),
        log_level="warning",
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=END_S,
    )
    server = uvicorn.Server(config)
    with contextlib.closing(listener):
        if args.with_stdin:
            threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
        log.info("%s is served at http://%s:%d", root, args.host, listener.getsockname()[1])
        asyncio.run(_serve(server, listener))
    return 0


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    await server.serve(sockets=[listener])


def token_for(auth: str, host: str) -> str | None:
    """The token that is asked for; None for none.

    Raises:
        ConfigError: there must be one, and is not.
    """
    if auth == "off":
        if not is_loopback(host):
            log.warning("--auth off on %s: whoever reaches this address reads the weights", host)
        return None
    token = store_token(os.environ)
    if token is None and (auth == "on" or not is_loopback(host)):
        why = "--auth on" if auth == "on" else f"--host {host} is not loopback"
        raise ConfigError(
            f'{why}: give a token in {VARIABLE}, e.g. {VARIABLE}="$(openssl rand -hex 32)"; '
            "--auth off only behind something that authenticates"
        )
    return token


def _end_with_stdin(server: uvicorn.Server) -> None:
    """Whoever started us holds the other end: it ends with it, even where that was killed."""
    sys.stdin.buffer.read()
    server.should_exit = True
