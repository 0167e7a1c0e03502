"""Redis' URL, which may carry a password: where it may stand, and how it is shown.

Every user of a machine sees the arguments of its processes, so a password comes in `SPOKE_REDIS_URL` or in a file,
and never on a command line. No log, error or saved setting shows it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from shared.errors import ConfigError

VARIABLE = "SPOKE_REDIS_URL"
_SECRETS = frozenset({"password", "username"})
_PASSWORD = re.compile(r"(?:rediss?|unix)://[^\s\"'@]*:[^\s\"']*@|[?&]password=", re.IGNORECASE)


def redacted(url: str) -> str:
    """A Redis URL without user and password, wherever it carries them.

    >>> redacted("redis://:secret@10.0.0.1:6379/0"), redacted("rediss://10.0.0.1/0?password=secret&ssl_ca_certs=ca")
    ('redis://10.0.0.1:6379/0', 'rediss://10.0.0.1/0?ssl_ca_certs=ca')

    A password whose `/`, `?` or `#` is not written as %2F, %3F, %23 takes the URL apart in the wrong place:

    >>> redacted("redis://:sec/ret@10.0.0.1:6379/0")
    'redis://…'
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return "redis://…"
    if "://" not in url or "@" in parts.path + parts.query + parts.fragment:
        return "redis://…"
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name not in _SECRETS]
    query = f"?{urlencode(kept, safe='/:')}" if kept else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def check_files(url: str) -> None:
    """Refuse certificates and keys that are not there, which the system's own error does not name.

    >>> check_files("rediss://host/0?ssl_ca_certs=/none.pem")
    Traceback (most recent call last):
    shared.errors.ConfigError: ssl_ca_certs in the URL of Redis: there is no file /none.pem

    Raises:
        ConfigError: one is not.
    """
    for name, value in parse_qsl(urlsplit(url).query):
        if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not Path(value).is_file():
            raise ConfigError(f"{name} in the URL of Redis: there is no file {value}")


def carries_password(text: str) -> bool:
    """Is there a Redis URL with a password in some text?

    >>> carries_password("redis://:secret@host/0"), carries_password("redis://host:6379/0")
    (True, False)
    """
    return _PASSWORD.search(text) is not None


def refuse_password(text: str, argument: str) -> None:
    """Refuse an argument that carries a password.

    Raises:
        ConfigError: it does; the message says where it may stand, and does not show it.
    """
    if carries_password(text):
        raise ConfigError(
            f"{argument}: a password in a process's arguments is seen by every user of the machine; "
            f"give this URL in {VARIABLE}"
        )


def from_command_line(
    given: str | None, argument: str, environment: Mapping[str, str]
) -> str | None:
    """The URL of an argument, else of the environment (empty counts as not there), else None.

    Raises:
        ConfigError: the argument carries a password.
    """
    if given is not None:
        refuse_password(given, argument)
        return given
    return environment.get(VARIABLE) or None
