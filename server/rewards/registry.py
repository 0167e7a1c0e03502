"""Names of rewards, and where each is found.

A name stands for a dotted path `package.module:function` that only the worker processes import (the server itself
never loads sympy or a user's code), or for the URL of a user's own reward server. Either is registered on the
server's command line, never by a request.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from server.rewards.base import nearest
from shared.errors import ConfigError, RequestError

BUILT_IN: Mapping[str, str] = {
    "gsm8k": "server.rewards.gsm8k:gsm8k",
    "math": "server.rewards.math:math",
}

SLOW_TO_LOAD = frozenset({"math"})
"""Loaded at the first use: importing sympy takes seconds of CPU in every worker process."""

_TARGET = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def reward_targets(own: Mapping[str, str]) -> dict[str, str]:
    """The built-in rewards plus a user's own.

    Args:
        own: name -> `package.module:function` or an http(s) URL.

    Raises:
        ConfigError: a path or a URL is malformed, or a name is taken.

    >>> sorted(reward_targets({"exact": "my_rewards.text:exact"}))
    ['exact', 'gsm8k', 'math']
    """
    for name, target in own.items():
        flag = f"--reward {name}={target}"
        if is_url(target):
            flag = f"--reward {name}=(URL)"  # there may be a secret in it
            _check_url(flag, target)
        elif not name or _TARGET.fullmatch(target) is None:
            raise ConfigError(
                f"{flag}: write NAME=package.module:function, e.g. exact=my_rewards.text:exact, "
                "or NAME=https://host/path"
            )
        if name in BUILT_IN:
            raise ConfigError(f"{flag}: {name!r} is built in; use another name")
    return {**BUILT_IN, **own}


def is_url(target: str) -> bool:
    """Is it the URL of a reward server, and no dotted path?

    >>> is_url("https://judge.example/grade"), is_url("my_rewards.text:exact")
    (True, False)
    """
    return target.lower().startswith(("http://", "https://"))


def _check_url(flag: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        bad = not parts.hostname or parts.port == 0 or not url.isprintable() or " " in url
    except ValueError:  # a port that is no number, half a bracket
        bad = True
    if bad:
        raise ConfigError(f"{flag}: no such URL can be; write NAME=https://host/path")
    if "@" in parts.netloc:
        raise ConfigError(
            f"{flag}: a user or password in a URL shows in process lists; put a bearer token into "
            "SPOKE_REWARD_TOKEN_NAME instead"
        )


def look_up(targets: Mapping[str, str], name: str) -> str:
    """Dotted path or URL of a reward.

    Raises:
        RequestError: no reward has that name (field `reward.name`).
    """
    if name not in targets:
        raise RequestError("reward.name", f"no reward {name!r}{nearest(name, frozenset(targets))}")
    return targets[name]
