"""What follows a prompt: engine requests of one rollout request, trimmed at its stop strings and counted.

Only token ids go to the engine: what follows the first tokens of a response is asked for by the prompt's tokens
and these.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.branches import cut
from server.costs import Cost, over_budget
from server.engines.base import Completion, Engine, GenerateRequest, GenerateResult, News
from server.tokens import Tokens
from shared.tree import FinishReason
from shared.wire import Sampling


@dataclass(slots=True)
class Counts:
    """Tokens of one tree."""

    continuations: int = 0
    """Asked for."""
    sampled: int = 0
    """In continuations that ended."""
    unfinished: int = 0
    """In those that were cancelled while they grew, as far as the engine had told."""
    discarded: int = 0
    """Sampled here, by earlier beginnings of the tree."""
    given_nodes: int = 0
    """Not sampled here, because the request gave them."""
    given_tokens: int = 0
    """In these."""
    foreseen: int = 0
    """Expected of a tree's children that have not ended."""
    computed_prefill: int = 0
    cached: int = 0
    decisions: int = 0
    """Early ones, by which the tree came out smaller than its plan."""

    @property
    def cost(self) -> Cost:
        """What the tree has come to."""
        return Cost(
            nodes=self.continuations + self.given_nodes, tokens=self.sampled + self.given_tokens
        )

    def add(self, result: GenerateResult) -> None:
        """Count the prefill of one engine request."""
        self.computed_prefill += result.computed_prefill_tokens
        self.cached += result.cached_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """Samples what follows one prompt.

    Args:
        engine: samples the tokens.
        tokens: decodes, to find stop strings.
        prompt: [P] token ids.
        sampling: how tokens are drawn.
        seed: of the whole tree.
        counts: tokens so far.
        budget: most nodes and tokens of the tree; None for no bound.
        reproducible: whether the seed decides the tree; see `GenerateRequest`.
        watched: count what is unfinished where a continuation is cancelled.
    """

    engine: Engine
    tokens: Tokens
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    counts: Counts = field(default_factory=Counts)
    budget: Cost | None = None
    reproducible: bool = True
    watched: bool = False

    def left(self, response: tuple[int, ...]) -> int:
        """Tokens that the response may still have."""
        return self.sampling.max_tokens - len(response)

    async def after(
        self,
        response: tuple[int, ...],
        samples: int,
        *,
        seed: int,
        limit: int | None = None,
        on_news: Callable[[Sequence[News]], None] | None = None,
        on_completion: Callable[[int, Completion], None] | None = None,
        priority: int = 0,
    ) -> list[Completion]:
        """Continuations of a response: one engine request.

        Args:
            response: [b] tokens from the prompt's end.
            samples: continuations.
            seed: sample i draws from the stream `seed + i`.
            limit: most tokens of each; None for as many as the response may still have.
            on_news: is told how they grow, before they are trimmed.
            on_completion: is told of each one when it has ended.
            priority: of the engine request.

        Raises:
            RequestError: the prompt does not fit the engine, or the tree is over its budget.
            EngineError: the engine failed.
        """
        self.counts.continuations += samples
        self._keep_to_budget()
        ended: dict[int, Completion] = {}
        grown: Counter[int] = Counter()

        def note(news: Sequence[News]) -> None:
            grown.update({piece.sample: len(piece.token_ids) for piece in news})
            if on_news is not None:
                on_news(news)

        def end(sample: int, completion: Completion) -> None:
            ended[sample] = self._trimmed(response, completion)
            self.counts.sampled += len(completion.token_ids)
            if on_completion is not None:
                on_completion(sample, ended[sample])

        try:
            result = await self.engine.generate(
                GenerateRequest(
                    prompt_token_ids=self.prompt + response,
                    samples=samples,
                    max_tokens=self.left(response) if limit is None else limit,
                    temperature=self.sampling.temperature,
                    top_p=self.sampling.top_p,
                    top_k=self.sampling.top_k,
                    seed=seed,
                    reproducible=self.reproducible,
                    stop=tuple(self.sampling.stop),
                    on_news=note if self.watched else on_news,
                    on_completion=end if on_completion is not None else None,
                    priority=priority,
                )
            )
        except asyncio.CancelledError:
            self.counts.unfinished += sum(n for sample, n in grown.items() if sample not in ended)
            raise
        self.counts.add(result)
        if on_completion is None:
            for sample, completion in enumerate(result.completions):
                end(sample, completion)
        return [ended[sample] for sample in range(samples)]

    def _keep_to_budget(self) -> None:
        """Refuse to grow on where the tree has more nodes or tokens than it may; its plan alone could not tell."""
        if self.budget is not None and not self.counts.cost.within(self.budget):
            raise over_budget(self.counts.cost, self.budget)

    def _trimmed(self, before: tuple[int, ...], completion: Completion) -> Completion:
        """End a completion with the token that completes a stop string, wherever the string began.

        The engine sees this completion alone; a stop string may begin in the tokens before it.
        """
        tokens = completion.token_ids
        if not self.has_stop((*before, *tokens)):
            return completion
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            if self.has_stop((*before, *tokens[:middle])):
                high = middle
            else:
                low = middle + 1
        return cut(completion, 0, low, FinishReason.STOP)

    def has_stop(self, response: tuple[int, ...]) -> bool:
        """Is a stop string in the text of a response?"""
        if not self.sampling.stop:
            return False
        text = self.tokens.decode(response)
        return any(stop in text for stop in self.sampling.stop)
