"""The guard in front of every path, mounted applications included.

| path | scope |
|---|---|
| `/livez`, `/readyz`, `/openapi.json`, `/docs` | none: probes and documentation |
| `/metrics` | `metrics` |
| `/weights/{run}/{version}/{name}` | `weights` |
| `/weight_transfer/…` | `admin` |
| every other one, known or not | `rollout` |

Websockets are refused: nothing here speaks them.
"""

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from server.auth import ALL, CALLER, STATE, Scope, TokenTable
from server.problems import problem
from shared.digests import sha256

OPEN = frozenset({"/livez", "/readyz", "/openapi.json", "/docs"})
"""Paths that need no token."""


def needed(path: str) -> Scope | None:
    """The scope that a path needs; None for none."""
    if path in OPEN:
        return None
    if path == "/metrics" or path.startswith("/metrics/"):
        return Scope.METRICS
    if path.startswith("/weights/") and path.count("/") > 2:
        return Scope.WEIGHTS
    if path.startswith("/weight_transfer/"):
        return Scope.ADMIN
    return Scope.ROLLOUT


class Guard:
    """ASGI middleware in front of every path, mounted applications included; websockets are refused.

    Args:
        app: what it guards.
        tokens: None lets everybody in.
    """

    def __init__(self, app: ASGIApp, tokens: TokenTable | None) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scopes: frozenset[Scope] | None = ALL
        caller = ""
        if self._tokens is not None:
            scopes, caller = self._presented(scope, self._tokens)
        need = needed(scope["path"])
        if need is not None and need not in (scopes or ()):
            await _refusal(need, scopes, sent=_has_credentials(scope))(scope, receive, send)
            return
        scope["state"] = {
            **scope.get("state", {}),
            STATE: scopes or frozenset(),
            CALLER: caller,
        }
        await self._app(scope, receive, send)

    def _presented(
        self, scope: Connection, tokens: TokenTable
    ) -> tuple[frozenset[Scope] | None, str]:
        """Scopes of the token that a request brings, and its digest."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return None, ""
        scheme, _, token = given[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return None, ""
        return tokens.scopes(token.strip()), sha256(token.strip())


def _has_credentials(scope: Connection) -> bool:
    return any(name == b"authorization" for name, _ in scope["headers"])


def _refusal(need: Scope, scopes: frozenset[Scope] | None, *, sent: bool) -> Response:
    challenge = 'Bearer realm="spoke"'
    if scopes is not None:
        return problem(
            403,
            f"this token lacks the scope {need}; ask the server's owner for one that has it",
            headers={"WWW-Authenticate": f'{challenge}, error="insufficient_scope", scope="{need}"'},
        )  # fmt: skip
    if sent:
        return problem(
            401,
            "this server knows no such token; send Authorization: Bearer TOKEN with one of its own",
            headers={"WWW-Authenticate": f'{challenge}, error="invalid_token"'},
        )
    return problem(
        401,
        f"send Authorization: Bearer TOKEN with a token that has the scope {need}",
        headers={"WWW-Authenticate": challenge},
    )
