"""What engines are held against: a plain forward pass of transformers, and a change of weights that fails."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from server.engines.base import Completion, Engine, GenerateRequest, GenerateResult

END = 1
TIMEOUT = 60.0


def ask(prompt: Sequence[int], **changes: Any) -> GenerateRequest:
    """A greedy request for one sample of 16 tokens, changed."""
    plain = GenerateRequest(
        prompt_token_ids=tuple(prompt), samples=1, max_tokens=16, temperature=0.0, seed=1
    )
    return replace(plain, **changes)


async def run(engine: Engine, request: GenerateRequest) -> GenerateResult:
    """The engine's answer, in bounded time."""
    return await asyncio.wait_for(engine.generate(request), TIMEOUT)


@torch.inference_mode()
def logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] float32 logits that each of `tokens` was drawn from."""
    output = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    return output[len(prompt) - 1 : -1].float()


def plain(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """[T] log-probability of each token in a plain forward pass."""
    logprobs = (logits(model, prompt, tokens) / (temperature or 1.0)).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def error(model: Any, request: GenerateRequest, completion: Completion) -> float:
    """Largest difference to a plain forward pass, nats."""
    ours = torch.tensor(completion.logprobs)
    theirs = plain(model, request.prompt_token_ids, completion.token_ids, request.temperature)
    return float((ours - theirs).abs().max())


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Token by token, no cache: slow and plain."""
    tokens: list[int] = []
    while len(tokens) < count and tokens[-1:] != [END]:
        tokens.append(int(logits(model, prompt, [*tokens, 0])[-1].argmax()))
    return tokens


class Broken:
    """A change that cannot be written; see `server.engines.staging.Change`."""

    nbytes = 0

    def apply(self) -> None:
        """Fails."""
        raise RuntimeError("out of luck")

    def undo(self) -> None:
        """Nothing to undo."""
