"""A request's prompt as token ids, refused where it does not fit the engine."""

import asyncio

from server.engines.base import EngineInfo
from server.tokens import Tokens
from shared.errors import RequestError
from shared.wire import RolloutTreeRequest

TOKEN_CHARS = 32
"""Characters for each token of the context; no more are tokenised. Text has about 4 a token; runs of blanks, where
a tokenizer has long tokens, some 20."""
OFF_LOOP_CHARS = 20_000
"""Longer texts are tokenised in a thread: about 5 ms, and fast tokenizers let the event loop run meanwhile."""


async def prompt_ids(
    request: RolloutTreeRequest, tokens: Tokens, info: EngineInfo
) -> tuple[int, ...]:
    """[P] token ids of the prompt.

    Args:
        request: has a text, messages or token ids.
        tokens: the model's tokenizer.
        info: the engine's limits.

    Raises:
        RequestError: it is empty, too long, or has a token that the model does not know.
    """
    characters = _checked_characters(request, info.max_model_len)
    if request.prompt_token_ids is not None:
        name, ids = "prompt_token_ids", request.prompt_token_ids
    else:
        name = "prompt" if request.prompt is not None else "messages"
        far = characters > OFF_LOOP_CHARS
        ids = (
            await asyncio.to_thread(_encoded, request, tokens) if far else _encoded(request, tokens)
        )
    if not ids:
        raise RequestError(name, "it has no tokens; write something")
    if max(ids) >= info.vocab_size:
        raise RequestError(name, f"token {max(ids)} is outside the vocabulary of {info.vocab_size}")
    if len(ids) >= info.max_model_len:
        raise RequestError(
            name,
            f"{len(ids)} tokens leave no room in a context of {info.max_model_len}; shorten it",
        )
    return tuple(ids)


def _encoded(request: RolloutTreeRequest, tokens: Tokens) -> list[int]:
    if request.prompt is not None:
        return tokens.encode(request.prompt)
    return tokens.encode_chat(request.messages or [])


def _checked_characters(request: RolloutTreeRequest, context: int) -> int:
    """Characters of a prompt; what will hardly fit is refused before it is tokenised, which takes time."""
    chat = sum(len(message.content) for message in request.messages or ())
    for name, characters in (("prompt", len(request.prompt or "")), ("messages", chat)):
        if characters > context * TOKEN_CHARS:
            raise RequestError(
                name,
                f"{characters} characters are more than {TOKEN_CHARS} for each token of this model's context of "
                f"{context}, and no more are tokenised; shorten it, or send prompt_token_ids",
            )
    return len(request.prompt or "") or chat
