"""fsspec's file systems as weights need them: each call bounded, no memory of listings, errors of one kind.

fsspec promises OSErrors. Implementations for clouds also raise those of their client libraries.
"""

import contextlib
import errno
import re
from collections.abc import Iterator

import fsspec
from fsspec.spec import AbstractFileSystem

from shared.errors import ConfigError, WeightsError
from shared.receiving import FULL
from shared.store_url import shown

S3 = frozenset({"s3", "s3a"})
OBJECTS = S3 | {"gs", "gcs"}
"""Protocols of object stores: no folders, and a file is there whole or not at all."""

CONNECT_S = 5.0
"""Bound of a connection's making to S3."""
STALL_S = 15.0
"""How long S3 may send no byte of an answer."""
TRIES = 3
"""Of each request to S3 that got no answer, or one that says to come again. s3fs' own tries, five of five where it
reads, are switched off: they would make half an hour of a store that accepts and says nothing."""
PUTS = 4
"""Parts of a file that are put into S3 at once: what the system buffers of them must leave within `STALL_S`."""

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CLIENTS = frozenset(
    {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "paramiko", "s3fs"}
)
"""Packages whose errors are the store's."""


def open_file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """(the file system, the path in it) of a store's URL.

    Raises:
        ConfigError: the URL cannot be used, or its package is not installed.
        WeightsError: it connects at once, and cannot.
    """
    scheme = url.partition("://")[0]
    options: dict[str, object] = {}
    if scheme in OBJECTS:
        _check_bucket(url)
        options["use_listings_cache"] = False  # others write too: what they wrote is seen at once
    if scheme in S3:
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_S,
            "read_timeout": STALL_S,
            "retries": {"mode": "standard", "total_max_attempts": TRIES},
        } | fsspec.config.conf.get(scheme, {}).get("config_kwargs", {})
    try:
        with as_os_errors():
            found, root = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"weight store {shown(url)!r}: {error}") from None
    except OSError as error:
        raise WeightsError(
            f"weight store {shown(url)} cannot be reached: {explained(error)}"
        ) from error
    if scheme in S3:
        found.retries, found.max_concurrency = 1, PUTS
    return found, root


def protocols(fs: AbstractFileSystem) -> set[str]:
    """The names of a file system's protocol."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _check_bucket(url: str) -> None:
    bucket = url.partition("://")[2].partition("/")[0]
    if "@" in bucket:
        raise ConfigError(
            f"weight store {shown(url)!r}: give credentials in the environment, not in the URL"
        )
    if not bucket.startswith("arn:") and not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            f"weight store {shown(url)!r}: write {url.partition('://')[0]}://BUCKET/…; a bucket's name has "
            "letters, digits and .-_ alone"
        )


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """What client libraries raise as OSErrors; what is nobody's but ours passes through."""
    try:
        yield
    except (
        Exception
    ) as error:  # edge to libraries that are not imported here: theirs are known by their package
        names = {f"{base.__module__}.{base.__name__}" for base in type(error).__mro__}
        if not {name.partition(".")[0] for name in names} & _CLIENTS:
            raise
        raise _kind(" ".join(names).lower())(str(error) or type(error).__name__) from error


def _kind(names: str) -> type[OSError]:
    if any(word in names for word in ("credential", "token", "profile", "auth")):
        return PermissionError
    if "timeout" in names:
        return TimeoutError
    return ConnectionError if "connect" in names else OSError


def lacks_bucket(error: OSError) -> bool:
    """Is it the bucket that is not there?"""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def explained(error: OSError, remedy: str = "") -> str:
    """What a store's error says, and what to do about it.

    Args:
        error: of the store.
        remedy: where none is known of this error.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    if error.errno in FULL:
        return f"{reason}; free some room, or lower fleet.keep_versions"
    if lacks_bucket(error):
        return f"{reason}; make the bucket, or correct the URL"
    if error.errno == errno.EBUSY:
        return f"{reason}; the store has too much to do: try again later"
    # Local ones have a number and name the file.
    if isinstance(error, PermissionError) and error.errno is None:
        return f"{reason}; see which credentials this process finds, and what they may do there"
    if isinstance(error, ConnectionError | TimeoutError) and error.errno is None:
        return f"{reason}; see that this machine reaches the store"
    return f"{reason}; {remedy}" if remedy else reason
