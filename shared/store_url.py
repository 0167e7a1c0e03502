"""A weight store's URL: which kind it is, how it is shown, and the token of those that ask for one."""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from shared.errors import ConfigError

VARIABLE = "SPOKE_STORE_TOKEN"
"""Holds the bearer token of HTTP stores and of servers that hand weights to one another."""

SHORTEST = 16
"""Characters of a token: fewer can be guessed."""
_USER = re.compile(r"://[^/?#]*@")
_PASSWORD = re.compile(r"://[^/?#@]*:[^/?#]*@")
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750's b64token


def is_http(url: str) -> bool:
    """Is it served over HTTP?

    >>> is_http("https://host/store"), is_http("s3://bucket/store"), is_http("/store")
    (True, False, False)
    """
    return url.partition("://")[0].lower() in ("http", "https") and "://" in url


def shown(url: str) -> str:
    """A store's URL without user, password and query, as it is printed and saved.

    >>> shown("sftp://me:secret@host/store?key=x"), shown("/store")
    ('sftp://host/store', '/store')
    >>> shown("simplecache::sftp://me:secret@host/store"), shown("http://[::1]:8100/a")
    ('simplecache::sftp://host/store', 'http://[::1]:8100/a')
    """
    if "://" not in url:
        return url
    return _USER.sub("://", url.partition("?")[0].partition("#")[0])


def check_announced(url: str, remedy: str) -> str:
    """A store's URL, as it may stand in a run's head, which everybody reads who reaches Redis.

    Args:
        url: of the store.
        remedy: how to announce another one.

    Raises:
        ConfigError: it carries a password.
    """
    if _PASSWORD.search(url):
        raise ConfigError(
            f"weight store {shown(url)!r}: its password would go to Redis and to every server; {remedy}, and "
            "give the servers theirs by their --store or in their environment"
        )
    return url


def check_http(url: str) -> str:
    """An HTTP store's URL without a slash at its end.

    Raises:
        ConfigError: it carries what does not belong there.
    """
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise ConfigError(f"weight store {shown(url)!r}: write http(s)://HOST:PORT, then a path")
    if "@" in parts.netloc:
        raise ConfigError(
            f"weight store {shown(url)!r}: give its token in {VARIABLE}, not in the URL"
        )
    return url.rstrip("/")


def store_token(environment: Mapping[str, str]) -> str | None:
    """The token of `VARIABLE`; empty counts as none.

    Raises:
        ConfigError: it is too short, or cannot stand in a header.
    """
    token = environment.get(VARIABLE, "").strip()
    if not token:
        return None
    if len(token) < SHORTEST:
        raise ConfigError(
            f"{VARIABLE}: the token has {len(token)} characters, fewer than {SHORTEST}; "
            "make one with `openssl rand -hex 32`"
        )
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError(
            f"{VARIABLE}: a token is made of letters, digits and -._~+/ alone (RFC 6750)"
        )
    return token
