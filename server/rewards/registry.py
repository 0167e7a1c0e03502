"""Names of reward functions, and where each is found.

A name stands for a dotted path `package.module:function` that only the worker processes import: the server itself
never loads sympy or a user's code. A user's own function is registered on the server's command line, never by a
request.
"""

import re
from collections.abc import Mapping

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
        own: name -> `package.module:function`.

    Raises:
        ConfigError: a path is malformed, or a name is taken.

    >>> sorted(reward_targets({"exact": "my_rewards.text:exact"}))
    ['exact', 'gsm8k', 'math']
    """
    for name, target in own.items():
        flag = f"--reward {name}={target}"
        if not name or _TARGET.fullmatch(target) is None:
            raise ConfigError(
                f"{flag}: write NAME=package.module:function, e.g. exact=my_rewards.text:exact"
            )
        if name in BUILT_IN:
            raise ConfigError(f"{flag}: {name!r} is built in; use another name")
    return {**BUILT_IN, **own}


def look_up(targets: Mapping[str, str], name: str) -> str:
    """Dotted path of a reward.

    Raises:
        RequestError: no reward has that name (field `reward.name`).
    """
    if name not in targets:
        raise RequestError("reward.name", f"no reward {name!r}{nearest(name, frozenset(targets))}")
    return targets[name]
