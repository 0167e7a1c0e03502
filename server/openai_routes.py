"""The OpenAI-compatible routes: forwarded to the engine's own application, once there is room for the request.

Errors in a request have OpenAI's form, which its clients read. What the server itself says, that it is
full, not ready or without such routes, is a problem document as everywhere.
"""

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.body import replay, strict_json
from server.costs import Cost
from shared.errors import RequestError

ROUTES = {"/v1/models": "GET", "/v1/completions": "POST", "/v1/chat/completions": "POST"}
"""All that is forwarded; whatever else the engine's application may have is not reached."""
MISSING = "only vLLM has the OpenAI routes: start the server with --engine vllm, or use POST /rollout_tree"
"""What a server with another engine answers."""
CHAT = "/v1/chat/completions"
MOST_PROMPTS = 2048
"""Of one request."""
TOKEN_CHARS = 4
"""Characters of a token, roughly, where a prompt is a text."""
MOST_VALUES = 20_000
"""Of a request beside its prompts: the application notes an error for each that is wrong, several for some."""
DEFAULT_TOKENS = {"/v1/completions": 16}
"""`max_tokens` of a request that leaves it out; where it is not here, all that fits the context."""

Enter = Callable[[Cost], AbstractAsyncContextManager[None]]
Target = Callable[[], tuple[ASGIApp, int]]


class Forward:
    """An ASGI endpoint that hands requests on.

    Args:
        target: the application that answers now, and the most tokens of its model's context; raises what is to be
            answered where there is none.
        enter: is entered, with what a request can cost, while it runs, to its last byte; raises where it may not.
    """

    def __init__(self, target: Target, enter: Enter) -> None:
        self._target = target
        self._enter = enter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app, context = self._target()
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        try:
            asked = strict_json(body) if body else None
        except json.JSONDecodeError as error:
            # What the application would let through: half a character fails in the engine.
            raise RequestError("body", f"it is not JSON: {error.msg}", status=400) from None
        async with self._enter(cost(scope["path"], asked, context)):
            # A copy: the application writes itself into the scope.
            await app(dict(scope), replay(body, receive), send)


def add_openai_routes(app: FastAPI, target: Target, enter: Enter) -> None:
    """Add the routes to a server's application; see `Forward`."""
    forward = Forward(target, enter)
    app.router.routes.extend(Route(path, forward, methods=[verb]) for path, verb in ROUTES.items())


def cost(path: str, asked: Any, context: int) -> Cost:  # noqa: ANN401 - whatever the caller sent
    """The most that a request can come to; nothing, where it asks for nothing that the engine would sample.

    Raises:
        RequestError: (400) it has too many values, or what decides the cost is written as the application may read
            in another way: a number as a text, say.

    >>> cost("/v1/completions", {"prompt": ["a", "b"], "n": 3, "max_tokens": 10}, 512)
    Cost(nodes=6, tokens=60)
    >>> cost("/v1/chat/completions", {"messages": []}, 512)
    Cost(nodes=1, tokens=512)
    >>> cost("/v1/models", None, 512)
    Cost(nodes=0, tokens=0)
    """
    if not isinstance(asked, dict):
        return Cost(nodes=0, tokens=0)
    if not _few_values([value for name, value in asked.items() if name != "prompt"]):
        detail = f"it has more than {MOST_VALUES:,} values beside its prompts; send less"
        raise RequestError("body", detail, status=400)
    nodes = _prompts(asked.get("prompt")) * (_count(asked, "n") or 1)
    limit, chat = _count(asked, "max_tokens"), _count(asked, "max_completion_tokens")
    if path == CHAT and asked.get("max_completion_tokens") is not None:
        limit = chat
    tokens = min(context, limit or DEFAULT_TOKENS.get(path, context))
    return Cost(nodes=nodes, tokens=nodes * tokens + _prompt_tokens(asked))


def _prompt_tokens(asked: dict[str, Any]) -> int:
    """Tokens of all prompts or messages, roughly: they take up the engine's memory as what is sampled does.

    >>> _prompt_tokens({"prompt": [[1, 2, 3], [4]]}), _prompt_tokens({"messages": [{"content": "a" * 40}]})
    (4, 10)
    """
    tokens, left = 0, [asked.get("prompt"), asked.get("messages")]
    while left:
        here = left.pop()
        if isinstance(here, str):
            tokens += len(here) // TOKEN_CHARS
        elif isinstance(here, list):
            ids = here and type(here[0]) is int
            tokens += len(here) if ids else 0
            left.extend(() if ids else here)
        elif isinstance(here, dict):
            left.extend(here.values())
    return tokens


def _prompts(prompt: Any) -> int:  # noqa: ANN401 - whatever the caller sent
    """How many prompts there are: one is a text or a list of token ids, several are a list of these.

    Raises:
        RequestError: (400) there are too many, or they are not alike: the application would try every reading.
    """
    if not isinstance(prompt, list):
        return 1
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return 1
    if len(prompt) > MOST_PROMPTS:
        detail = f"{len(prompt)} prompts are more than {MOST_PROMPTS}; ask in several requests"
        raise RequestError("prompt", detail, status=400)
    ids = kinds == {list} and all(set(map(type, one)) <= {int} for one in prompt)
    if kinds and kinds != {str} and not ids:
        detail = "write a text, a list of texts, token ids, or a list of lists of token ids"
        raise RequestError("prompt", detail, status=400)
    return len(prompt)


def _few_values(value: Any) -> bool:  # noqa: ANN401 - whatever the caller sent
    """Are there at most `MOST_VALUES` in it, at any depth? Looks at no more."""
    seen, left = 0, [value]
    while left:
        here = left.pop()
        parts = here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
        seen += len(parts)
        if seen > MOST_VALUES:
            return False
        left.extend(parts)
    return True


def _count(asked: dict[str, Any], name: str) -> int | None:
    """A number from 1; None for what the application will refuse or fill in.

    Raises:
        RequestError: (400) it is no integer, which the application might read as one.
    """
    value = asked.get(name)
    if value is None:
        return None
    if type(value) is not int:  # true is an int too
        raise RequestError(name, "write an integer, without quotes and point, or null", status=400)
    return value if value > 0 else None
