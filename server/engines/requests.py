"""Whether a request fits an engine."""

import math

from server.engines.base import EngineInfo, GenerateRequest
from shared.errors import RequestError


def check_request(request: GenerateRequest, info: EngineInfo) -> None:
    """Refuse what cannot be sampled.

    Raises:
        RequestError: with the field that is wrong.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("prompt_token_ids", "is empty; a response needs a token to follow")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise RequestError(
            "prompt_token_ids", f"holds token {wrong}; the vocabulary is 0 to {info.vocab_size - 1}"
        )
    if len(prompt) >= info.max_model_len:
        raise RequestError(
            "prompt_token_ids",
            f"has {len(prompt)} tokens, which leaves no room in a context of {info.max_model_len}",
        )
    for name in ("samples", "max_tokens"):
        if getattr(request, name) < 1:
            raise RequestError(name, f"is {getattr(request, name)}; must be at least 1")
    if not 0 <= request.temperature < math.inf:
        raise RequestError("temperature", f"is {request.temperature}; must be finite, 0 or more")
    if not 0 <= request.seed < 2**63 - request.samples:
        raise RequestError("seed", f"is {request.seed}; must be from 0 to 2^63 - samples")
    if not 0 < request.top_p <= 1:
        raise RequestError("top_p", f"is {request.top_p}; must be above 0 and at most 1")
    if request.top_k < 0:
        raise RequestError("top_k", f"is {request.top_k}; must be 0 (off) or more")
