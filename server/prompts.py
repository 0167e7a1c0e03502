"""A request's prompt as token ids, refused where it does not fit the engine."""

from server.engines.base import EngineInfo
from server.tokens import Tokens
from shared.errors import RequestError
from shared.wire import RolloutTreeRequest

TOKEN_CHARS = 256
"""No tokenizer's longest token has more characters."""


def prompt_ids(request: RolloutTreeRequest, tokens: Tokens, info: EngineInfo) -> tuple[int, ...]:
    """[P] token ids of the prompt.

    Args:
        request: has a text, messages or token ids.
        tokens: the model's tokenizer.
        info: the engine's limits.

    Raises:
        RequestError: it is empty, too long, or has a token that the model does not know.
    """
    _check_characters(request, info.max_model_len)
    if request.prompt is not None:
        name, ids = "prompt", tokens.encode(request.prompt)
    elif request.messages is not None:
        name, ids = "messages", tokens.encode_chat(request.messages)
    else:
        name, ids = "prompt_token_ids", request.prompt_token_ids or []
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


def _check_characters(request: RolloutTreeRequest, context: int) -> None:
    """Refuse what cannot fit the context before it is tokenised, which takes time."""
    chat = sum(len(message.content) for message in request.messages or ())
    for name, characters in (("prompt", len(request.prompt or "")), ("messages", chat)):
        if characters > context * TOKEN_CHARS:
            raise RequestError(
                name,
                f"{characters} characters cannot fit a context of {context} tokens; shorten it",
            )
