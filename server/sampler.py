"""Prefix branching: one prompt and a plan into a tree of sampled segments.

Each node is one engine request of n = its branch factor; its children are expanded the moment that request is
done, whatever the rest of the level does. Only token ids go to the engine: a child's prompt is its parent's
prompt plus its parent's tokens.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engines.base import Completion, Engine, GenerateRequest, GenerateResult, spans
from server.seeds import node_seed
from server.tokens import Tokens
from shared.tree import FinishReason
from shared.wire import GroupPlan, Sampling, TreePlan


@dataclass(slots=True, kw_only=True)
class Branch:
    """A node while it grows."""

    completion: Completion | None
    """What was sampled; None for the prompt."""
    path: tuple[int, ...]
    """Sibling positions from the prompt down to this node."""
    response: tuple[int, ...]
    """[T] tokens from the prompt's end to this node's end."""
    children: list["Branch"] = field(default_factory=list)

    def walk(self) -> Iterator["Branch"]:
        """This node and all below it: parents first, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(slots=True)
class Counts:
    """Tokens of one tree."""

    sampled: int = 0
    computed_prefill: int = 0
    cached: int = 0

    def add(self, result: GenerateResult) -> None:
        """Count one engine request."""
        self.sampled += sum(len(c.token_ids) for c in result.completions)
        self.computed_prefill += result.computed_prefill_tokens
        self.cached += result.cached_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Samples one tree.

    Args:
        engine: samples the tokens.
        tokens: decodes, to find stop strings.
        prompt: [P] token ids.
        plan: the tree's shape; a group is a tree of depth one whose segments are whole responses.
        sampling: how tokens are drawn.
        seed: of the whole tree.
    """

    engine: Engine
    tokens: Tokens
    prompt: tuple[int, ...]
    plan: TreePlan | GroupPlan
    sampling: Sampling
    seed: int
    counts: Counts = field(default_factory=Counts)

    @property
    def branch_factors(self) -> list[int]:
        """Children of each live node, by depth."""
        return [self.plan.samples] if isinstance(self.plan, GroupPlan) else self.plan.branch_factors

    async def sample(self) -> Branch:
        """The tree's root, grown to its leaves. Cancelling the task aborts every engine request.

        Raises:
            RequestError: the prompt does not fit the engine.
            EngineError: the engine failed.
        """
        root = Branch(completion=None, path=(), response=())
        try:
            await self._expand(root)
        except* Exception as group:  # the first cause tells more than a tree of groups
            cause: BaseException = group
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            raise cause from None
        return root

    async def _expand(self, node: Branch) -> None:
        limit = self._limit(node)
        result = await self.engine.generate(self._request(node, limit))
        self.counts.add(result)
        async with asyncio.TaskGroup() as group:
            for position, completion in enumerate(result.completions):
                child = self._child(node, position, completion)
                node.children.append(child)
                if self._is_live(child, limit):
                    group.create_task(self._expand(child))

    def _limit(self, node: Branch) -> int:
        """Most tokens of each child of `node`: its segment, within what the response may still have."""
        left = self.sampling.max_tokens - len(node.response)
        at_last_depth = len(node.path) == len(self.branch_factors) - 1
        if at_last_depth or isinstance(self.plan, GroupPlan):
            return left
        return min(left, self.plan.segment_tokens)

    def _request(self, node: Branch, limit: int) -> GenerateRequest:
        sampling = self.sampling
        return GenerateRequest(
            prompt_token_ids=self.prompt + node.response,
            samples=self.branch_factors[len(node.path)],
            max_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=node_seed(self.seed, node.path),
            stop=tuple(sampling.stop),
        )

    def _child(self, node: Branch, position: int, completion: Completion) -> Branch:
        if self.sampling.stop:
            completion = self._trim_at_stop(node.response, completion)
        return Branch(
            completion=completion,
            path=(*node.path, position),
            response=(*node.response, *completion.token_ids),
        )

    def _is_live(self, child: Branch, limit: int) -> bool:
        """May the response go on below this node?"""
        completion = child.completion
        assert completion is not None, "only the prompt has no completion"
        return (
            completion.finish_reason is FinishReason.LENGTH
            and len(child.path) < len(self.branch_factors)
            and len(completion.token_ids) == limit
            and len(child.response) < self.sampling.max_tokens
            and len(self.prompt) + len(child.response) < self.engine.info.max_model_len
        )

    def _trim_at_stop(self, before: tuple[int, ...], completion: Completion) -> Completion:
        """End a completion with the token that completes a stop string, wherever the string began.

        The engine sees one segment; a stop string may begin in the segment before it.
        """
        low, high = 1, len(completion.token_ids)
        if not self._has_stop(before + tuple(completion.token_ids)):
            return completion
        while low < high:
            middle = (low + high) // 2
            if self._has_stop(before + tuple(completion.token_ids[:middle])):
                high = middle
            else:
                low = middle + 1
        versions = [v for v, count in completion.versions for _ in range(count)]
        return Completion(
            token_ids=completion.token_ids[:low],
            logprobs=completion.logprobs[:low],
            versions=spans(versions[:low]),
            finish_reason=FinishReason.STOP,
        )

    def _has_stop(self, response: tuple[int, ...]) -> bool:
        text = self.tokens.decode(response)
        return any(stop in text for stop in self.sampling.stop)
