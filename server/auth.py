"""Bearer tokens and their scopes: read, compared, and asked for; `guard` stands in front of the paths.

    SPOKE_TOKENS="TOKEN rollout,metrics; TOKEN admin"        or --tokens-file, one a line, `#` begins a comment

No scope implies another: a token with `admin` alone can sample nothing. `admin` adds what only the server's owner
may see, such as the texts of failed reward functions, which may quote the reference answer.
"""

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from shared.addresses import is_loopback
from shared.errors import ConfigError

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

log = logging.getLogger("spoke.auth")

VARIABLE = "SPOKE_TOKENS"
SHORTEST = 16
"""Characters of a token: fewer can be guessed."""
STATE = "granted"
"""Where the guard leaves a request's scopes in its ASGI state."""
CALLER = "caller"
"""Where it leaves who sent the request."""
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750's b64token


class Scope(StrEnum):
    """What a token allows; none implies another."""

    ROLLOUT = "rollout"
    """Sampling, `/info`, and every path that has no scope of its own."""
    ADMIN = "admin"
    """Details that only the server's owner may see."""
    METRICS = "metrics"
    """`/metrics`."""
    WEIGHTS = "weights"
    """Files of weight versions, for other servers."""


class AuthMode(StrEnum):
    """When tokens are asked for."""

    AUTO = "auto"
    """Where tokens are given; and they must be, unless the server binds to the loopback interface."""
    ON = "on"
    OFF = "off"


ALL = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Digests of the tokens and their scopes; the tokens themselves are forgotten."""

    entries: tuple[tuple[bytes, frozenset[Scope]], ...] = field(repr=False)

    def scopes(self, presented: bytes) -> frozenset[Scope] | None:
        """Scopes of a token, None where there is no such one; the time does not depend on which it is."""
        digest = hashlib.sha256(presented).digest()
        found = None
        for known, scopes in self.entries:
            if hmac.compare_digest(known, digest):
                found = scopes
        return found


def parse_tokens(text: str, source: str) -> list[tuple[bytes, frozenset[Scope]]]:
    """Digests and scopes of `TOKEN scope[,scope…]`, one a line or between semicolons; `#` begins a comment.

    Args:
        text: the tokens.
        source: where they come from, for errors, which never show a token.

    Raises:
        ConfigError: one of them cannot be used.

    >>> [sorted(map(str, scopes)) for _, scopes in parse_tokens("0123456789abcdef rollout,metrics", "here")]
    [['metrics', 'rollout']]
    """
    entries: list[tuple[bytes, frozenset[Scope]]] = []
    for where, entry in _entries(text, source):
        token, _, names = entry.partition(" ")
        if len(token) < SHORTEST:
            raise ConfigError(
                f"{where}: the token has {len(token)} characters, fewer than {SHORTEST}; "
                "make one with `openssl rand -hex 32`"
            )
        if _TOKEN.fullmatch(token) is None:
            raise ConfigError(
                f"{where}: a token is made of letters, digits and -._~+/ alone (RFC 6750)"
            )
        digest = hashlib.sha256(token.encode()).digest()
        if any(digest == known for known, _ in entries):
            raise ConfigError(f"{where}: this token was given before; each has one entry")
        entries.append((digest, _scopes(names, where)))
    return entries


def _entries(text: str, source: str) -> Iterator[tuple[str, str]]:
    """(where it stands, the entry with single blanks) of each token."""
    for number, line in enumerate(text.splitlines(), start=1):
        parts = [" ".join(part.split()) for part in line.partition("#")[0].split(";")]
        for place, entry in enumerate(filter(None, parts), start=1):
            yield f"{source}, line {number}, token {place}", entry


def _scopes(names: str, where: str) -> frozenset[Scope]:
    known = [str(scope) for scope in Scope]
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name in known:
            continue
        # An unknown word may be a token in the wrong place: only what is too short to be one is shown.
        shown = f" {name!r}" if 0 < len(name) < SHORTEST else ""
        near = get_close_matches(name, known, n=1, cutoff=0.0) if name else []
        raise ConfigError(
            f"{where}: unknown scope{shown}; did you mean {near[0]}? Known: {', '.join(known)}"
            if near
            else f"{where}: a scope is missing; write TOKEN scope[,scope…] with {', '.join(known)}"
        )
    return frozenset(map(Scope, wanted))


def load_tokens(
    tokens_file: Path | None, environment: MutableMapping[str, str]
) -> TokenTable | None:
    """Tokens of a file and of the environment together; None where neither gives any.

    The variable is taken out of the environment, so that no child process, such as a reward function's, has it.

    Raises:
        ConfigError: the file cannot be read, or a token cannot be used.
    """
    entries = parse_tokens(environment.pop(VARIABLE, ""), VARIABLE)
    if tokens_file is not None:
        source = f"--tokens-file {tokens_file}"
        try:
            text = tokens_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"{source}: {reason}") from None
        own = parse_tokens(text, source)
        if not own:
            raise ConfigError(f"{source}: it has no token; write TOKEN scope[,scope…] a line")
        if {digest for digest, _ in own} & {digest for digest, _ in entries}:
            raise ConfigError(f"{source}: a token of it is in {VARIABLE} too; give it once")
        entries += own
    return TokenTable(tuple(entries)) if entries else None


def with_store_token(tokens: TokenTable | None, token: str | None) -> TokenTable | None:
    """Tokens of which the store's reads weights, as servers that fetch from one another need, and nothing else.

    Args:
        tokens: None where none are asked for: the store's alone asks for none.
        token: of `SPOKE_STORE_TOKEN`.
    """
    if tokens is None or token is None:
        return tokens
    digest = hashlib.sha256(token.encode()).digest()
    others = tuple(entry for entry in tokens.entries if entry[0] != digest)
    own = dict(tokens.entries).get(digest, frozenset())
    return TokenTable((*others, (digest, own | {Scope.WEIGHTS})))


def enforced(mode: AuthMode, host: str, tokens: TokenTable | None) -> TokenTable | None:
    """The tokens that the guard asks for; None where it asks for none.

    Raises:
        ConfigError: tokens are needed and not there.
    """
    if mode is AuthMode.OFF:
        return None
    if tokens is None and (mode is AuthMode.ON or not is_loopback(host)):
        why = "--auth on" if mode is AuthMode.ON else f"--host {host} is not loopback"
        raise ConfigError(
            f"{why}: give tokens in {VARIABLE} or --tokens-file, e.g. "
            f'{VARIABLE}="$(openssl rand -hex 32) rollout,metrics"; '
            "--auth off only behind something that authenticates"
        )
    return tokens


def log_auth(
    mode: AuthMode,
    host: str,
    tokens: TokenTable | None,
    tokens_file: Path | None,
    *,
    in_environment: bool = False,
) -> None:
    """Say what is asked for, and warn of what looks like a mistake.

    Args:
        mode: when tokens are asked for.
        host: that the server binds to.
        tokens: that are asked for.
        tokens_file: where some came from, used or not.
        in_environment: whether some came from the environment, used or not.
    """
    if tokens is not None:
        log.info("bearer tokens are asked for: %d known", len(tokens.entries))
    elif not is_loopback(host):
        log.warning("--auth off on %s: whoever reaches this address may use the server", host)
    if mode is AuthMode.OFF and tokens_file is not None:
        log.warning("--auth off: the tokens of %s are not used", tokens_file)
    if mode is AuthMode.OFF and in_environment:
        log.warning("--auth off: the tokens of %s are not used", VARIABLE)
    if tokens_file is not None and os.stat(tokens_file).st_mode & 0o004:
        log.warning("%s can be read by every user here: chmod 600 it", tokens_file)


def caller(request: "HTTPConnection") -> str:
    """Who sent a request: the same for all that bring one token, and for all where tokens are not asked for."""
    found: str = request.scope.get("state", {}).get(CALLER, "")
    return found


def granted(request: "HTTPConnection") -> frozenset[Scope]:
    """Scopes of whoever sent a request: all where tokens are not asked for, none where no guard stands."""
    found: frozenset[Scope] = request.scope.get("state", {}).get(STATE, frozenset())
    return found
