"""Prefix branching: one prompt and a plan into a tree of sampled segments.

Each node is one engine request of n = its branch factor; its children are expanded the moment that request is
done, whatever the rest of the level does. A child's prompt is its parent's prompt plus its parent's tokens.
"""

import asyncio
from dataclasses import dataclass

from server.branches import Branch
from server.chain import sample_chain
from server.continuations import Continuations
from server.seeds import node_seed
from shared.tree import FinishReason
from shared.wire import ChainPlan, Plan, TreePlan


async def sample(plan: Plan, continuations: Continuations) -> Branch:
    """The root of what a plan asks for, grown to its leaves. Cancelling aborts every engine request.

    Raises:
        RequestError: the prompt does not fit the engine.
        EngineError: the engine failed.
    """
    try:
        match plan:
            case ChainPlan():
                return await sample_chain(plan, continuations)
            case TreePlan():
                factors, segment_tokens = plan.branch_factors, plan.segment_tokens
            case (
                _
            ):  # a group is a tree of depth one, and children at the last depth run to their end
                factors, segment_tokens = [plan.samples], continuations.sampling.max_tokens
        root = Branch.prompt()
        await _Tree(factors, segment_tokens, continuations).expand(root, ())
        return root
    except* Exception as group:  # the first cause tells more than a tree of groups
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise cause from None


@dataclass(frozen=True, slots=True)
class _Tree:
    """Grows one tree.

    Args:
        branch_factors: children of each live node, by depth.
        segment_tokens: most tokens of a segment above the last depth.
        continuations: samples.
    """

    branch_factors: list[int]
    segment_tokens: int
    continuations: Continuations

    async def expand(self, node: Branch, path: tuple[int, ...]) -> None:
        """Grow all below `node`, to which `path` leads by sibling positions."""
        limit = self._limit(node, len(path))
        completions = await self.continuations.after(
            node.response,
            self.branch_factors[len(path)],
            seed=node_seed(self.continuations.seed, path),
            limit=limit,
        )
        async with asyncio.TaskGroup() as group:
            for position, completion in enumerate(completions):
                response = (*node.response, *completion.token_ids)
                child = Branch(completion=completion, response=response)
                node.children.append(child)
                if len(path) + 1 < len(self.branch_factors) and self._is_live(child, limit):
                    group.create_task(self.expand(child, (*path, position)))

    def _limit(self, node: Branch, depth: int) -> int:
        """Most tokens of each child of `node`: its segment, within what the response may still have."""
        left = self.continuations.left(node.response)
        at_last_depth = depth == len(self.branch_factors) - 1
        return left if at_last_depth else min(left, self.segment_tokens)

    def _is_live(self, child: Branch, limit: int) -> bool:
        """May the response go on below this node?"""
        completion, continuations = child.completion, self.continuations
        assert completion is not None, "only the prompt has no completion"
        context = continuations.engine.info.max_model_len
        return (
            completion.finish_reason is FinishReason.LENGTH
            and len(completion.token_ids) == limit
            and continuations.left(child.response) > 0
            and len(continuations.prompt) + len(child.response) < context
        )
