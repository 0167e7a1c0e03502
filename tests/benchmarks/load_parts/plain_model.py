"""The logprobs of a tree by a plain forward pass: no cache, no batching of our own, no sampling."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shared.wire import RolloutTreeRequest, RolloutTreeResponse

TOGETHER = 64
"""Paths in one pass."""
TOLERANCE = 1e-3
"""Most that a float32 logprob may be off, nats."""


class PlainModel:
    """A checkpoint under transformers, in float32.

    Args:
        model: folder of the checkpoint.
    """

    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def faults(self, request: RolloutTreeRequest, tree: RolloutTreeResponse) -> list[str]:
        """Nodes whose logprobs are not those of their tokens. The request truncates by no top_k and no top_p."""
        temperature = request.sampling.temperature or 1.0
        leaves = [leaf.id for leaf in tree.leaves()]
        found: dict[int, str] = {}
        for first in range(0, len(leaves), TOGETHER):
            some = leaves[first : first + TOGETHER]
            responses = [tree.response_token_ids(leaf) for leaf in some]
            for leaf, expected in zip(
                some, self._logprobs(tree.prompt_token_ids, responses, temperature), strict=True
            ):
                path = tree.path(leaf)
                ours = [logprob for node in path for logprob in node.logprobs or []]
                owners = [node.id for node in path for _ in node.token_ids]
                for owner, mine, plain in zip(owners, ours, expected, strict=True):
                    if not abs(mine - plain) <= TOLERANCE:
                        found[owner] = (
                            f"node {owner}: logprob {mine:.5f}, by a plain pass {plain:.5f}"
                        )
        return list(found.values())

    @torch.inference_mode()
    def _logprobs(
        self, prompt: list[int], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """[B][T] log-probability of each token of each response."""
        longest = max(map(len, responses))
        # Filled up behind their ends, where a causal model does not look back from.
        rows = torch.tensor([[*prompt, *r, *[0] * (longest - len(r))] for r in responses])
        logits = self._model(rows).logits[:, len(prompt) - 1 : -1].float() / temperature
        chosen = logits.log_softmax(-1).gather(-1, rows[:, len(prompt) :, None])[..., 0]
        return [row[: len(r)].tolist() for row, r in zip(chosen, responses, strict=True)]
