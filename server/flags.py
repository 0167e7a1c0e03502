"""Numbers, URLs and folders of the command line, checked before anything is loaded; refusals name their flag."""

import argparse
import math
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import urlsplit

from shared.errors import ConfigError

ABOVE_ZERO = (
    "max-model-len", "max-batch", "threads", "kv-cache-gib", "gpu-memory-utilization", "reward-workers",
    "reward-memory-gib", "reward-timeout", "max-nodes-in-flight", "max-tokens-in-flight", "max-tree-nodes",
    "max-tree-tokens", "liveness-timeout", "reward-http-timeout", "reward-http-batch", "reward-http-connections",
    "max-body-mib", "max-depth", "max-leaves",
)  # fmt: skip
AT_MOST = {"gpu-memory-utilization": 1, "max-depth": 16, "port": 65_535}
"""`max-depth`: no plan on the wire has more levels (`shared/wire.py`)."""
FROM_ZERO = ("port", "drain", "redis-wait", "max-lag")


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that no server can work with.

    Raises:
        ConfigError: the first of them.
    """
    for flag in (*ABOVE_ZERO, *FROM_ZERO):
        number = getattr(args, flag.replace("-", "_"))
        if number is None:  # the engine decides
            continue
        if not math.isfinite(number):
            raise ConfigError(f"--{flag} {number}: must be a finite number")
        if flag in ABOVE_ZERO and number <= 0:
            raise ConfigError(f"--{flag} {number}: must be above 0")
        if number < 0:
            raise ConfigError(f"--{flag} {number}: must not be below 0")
        if number > AT_MOST.get(flag, math.inf):
            raise ConfigError(f"--{flag} {number}: must be at most {AT_MOST[flag]}")
    if args.advertise_url is not None and not _is_url(args.advertise_url):
        raise ConfigError(
            f"--advertise-url {args.advertise_url}: must be an http(s) URL such as http://host:8000"
        )
    if args.weights_dir is not None:
        _check_folder(args.weights_dir)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--weights-dir {folder}: {error.strerror}; give a folder that can be written to"
        ) from None


def _is_url(text: str) -> bool:
    """Is it a URL that trainers can ask?

    >>> [_is_url(url) for url in ("http://a:8000", "https://[::1]/spoke", "a:8000", "http://a:x", "http://a b")]
    [True, True, False, False, False]
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # a port that is no number, half a bracket
        return False
    plain = text.isprintable() and " " not in text and not (parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain
