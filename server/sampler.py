"""Prefix branching: one prompt and a plan into a tree of sampled segments.

Each node is one engine request of n = its branch factor. A child is expanded the moment its own last token is
there, whatever its siblings do; deeper nodes go first, so that trees end and leave their memory to others. A
child's prompt is its parent's prompt plus its parent's tokens.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from server.branches import Branch, Path
from server.chain import sample_chain
from server.continuations import Continuations
from server.engines.base import Completion
from server.given import Given, gaps
from server.grading import Grading
from server.seeds import node_seed, state_seed
from shared.tree import FinishReason
from shared.wire import ChainPlan, GroupPlan, Plan, Savings, TreePlan


async def sample(
    plan: Plan,
    continuations: Continuations,
    *,
    savings: Savings | None = None,
    grading: Grading | None = None,
    given: Given | None = None,
    on_branch: Callable[[Path, Branch], None] | None = None,
) -> Branch:
    """The root of what a plan asks for, grown to its leaves. Cancelling aborts every engine request.

    Args:
        plan: of the request.
        continuations: samples.
        savings: early decisions; None for none. Not for chains.
        grading: grades leaves while the tree grows; needed by savings that look at rewards.
        given: nodes that are there already; none for chains, probes and `branch_tokens`.
        on_branch: is told of each node when it is finished, given ones too; of a chain's only when all are.

    Raises:
        RequestError: the prompt does not fit the engine, or the tree grew over its budget.
        EngineError: the engine failed.
    """
    tell = on_branch or _nobody
    try:
        if isinstance(plan, ChainPlan):
            root = await sample_chain(plan, continuations)
            _tell_all(root, tell)
            return root
        growth = _Growth(plan, continuations, savings or Savings(), grading, given or {}, tell)
        if growth.savings.probe is not None:
            probed = await growth.probe(growth.savings.probe)
            if await growth.agrees(probed):
                continuations.counts.decisions += 1
                _tell_all(probed, tell)
                return probed
        root = Branch.prompt()
        await growth.expand(root, ())
        return root
    except* Exception as group:  # the first cause tells more than a tree of groups
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise cause from None


@dataclass(frozen=True, slots=True)
class _Growth:
    """Grows one tree.

    Args:
        plan: a tree, or a group, which is a tree of depth one.
        continuations: samples.
        savings: early decisions.
        grading: grades leaves where savings ask for it.
        given: nodes that are there already.
        tell: is told of each node when it is finished.
    """

    plan: TreePlan | GroupPlan
    continuations: Continuations
    savings: Savings
    grading: Grading | None
    given: Given
    tell: Callable[[Path, Branch], None]

    @property
    def factors(self) -> list[int]:
        """Children of each live node, by depth."""
        return self.plan.branch_factors if isinstance(self.plan, TreePlan) else [self.plan.samples]

    async def expand(self, node: Branch, path: Path) -> None:
        """Grow all below `node`, to which `path` leads."""
        children, limit = self.factors[len(path)], self._limit(node, len(path))
        if path and self._is_over_budget(children, limit):
            children, limit = 1, self.continuations.left(node.response)
            self.continuations.counts.decisions += 1
        first_round = min(self.savings.settle_after or children, children)
        await self._children(node, path, 0, first_round, limit)
        if first_round == children:
            return
        # Where later children are given, the attempt before this one has decided to go on.
        decided = any((*path, at) in self.given for at in range(first_round, children))
        if not decided and await self.agrees(node):
            self.continuations.counts.decisions += 1
        else:
            await self._children(node, path, first_round, children - first_round, limit)

    async def probe(self, samples: int) -> Branch:
        """Whole responses from the prompt, by streams that the tree does not use."""
        root = Branch.prompt()
        seed = state_seed(self.continuations.seed, ())
        for completion in await self.continuations.after((), samples, seed=seed):
            root.children.append(
                Branch(completion=completion, response=tuple(completion.token_ids))
            )
        return root

    async def agrees(self, node: Branch) -> bool:
        """Do all leaves below a node have one and the same reward?"""
        assert self.grading is not None, "savings that look at rewards come with a reward"
        graded = await self.grading.below(node)
        return not any(g.error for g in graded) and len({g.reward for g in graded}) == 1

    async def _children(self, node: Branch, path: Path, first: int, count: int, limit: int) -> None:
        """Sample children `first` to `first + count - 1` where they are not given, and grow all below them."""
        ended: asyncio.Queue[tuple[int, Completion]] = asyncio.Queue()
        grown: dict[int, Branch] = {}
        counts, share = self.continuations.counts, self._foreseen(limit)
        counts.foreseen += count * share
        given = self._given(path, first, count)
        for at, completion in given.items():
            ended.put_nowait((at, completion))
        async with asyncio.TaskGroup() as group:
            for start, samples in gaps(first, count, set(given)):
                group.create_task(
                    self.continuations.after(
                        node.response,
                        samples,
                        seed=node_seed(self.continuations.seed, path) + start,
                        limit=limit,
                        on_completion=partial(_put, ended, start),
                        priority=-len(path),
                    )
                )
            for _ in range(count):
                at, completion = await ended.get()
                counts.foreseen -= share
                child = Branch(
                    completion=completion, response=(*node.response, *completion.token_ids)
                )
                grown[at] = child
                below = (*path, at)
                self.tell(below, child)
                # Another server's segments may be of another length, where ends are moved.
                whole = len(completion.token_ids) if at in given else limit
                if len(below) < len(self.factors) and self._is_live(child, whole):
                    group.create_task(self.expand(child, below))
        node.children.extend(grown[at] for at in range(first, first + count))

    def _given(self, path: Path, first: int, count: int) -> dict[int, Completion]:
        """Children of a node that are there already, by position; they are counted."""
        places = range(first, first + count) if self.given else ()
        given = {at: self.given[*path, at] for at in places if (*path, at) in self.given}
        self.continuations.counts.given_nodes += len(given)
        self.continuations.counts.given_tokens += sum(len(c.token_ids) for c in given.values())
        return given

    def _is_over_budget(self, children: int, limit: int) -> bool:
        """Would so many more children take the tree over its tokens, with all that it has asked for?

        What was sampled is not enough to go by: on an idle engine whole generations of nodes end at once.
        """
        counts, budget = self.continuations.counts, self.savings.branch_tokens
        spent = counts.sampled + counts.foreseen
        return budget is not None and spent + children * self._foreseen(limit) > budget

    def _foreseen(self, limit: int) -> int:
        """Tokens to expect of a child: a segment's, also where it may run to its end; of a group's, none are."""
        return min(limit, self.plan.segment_tokens) if isinstance(self.plan, TreePlan) else 0

    def _limit(self, node: Branch, depth: int) -> int:
        """Most tokens of each child of `node`: its segment, within what the response may still have."""
        left = self.continuations.left(node.response)
        if isinstance(self.plan, GroupPlan) or depth == len(self.factors) - 1:
            return left
        segment = min(left, self.plan.segment_tokens)
        return min(left, self._aligned(node, segment)) if self.plan.align else segment

    def _aligned(self, node: Branch, segment: int) -> int:
        """The length nearest to a segment's with which it ends one token behind a block of the engine's cache.

        Whole blocks are reused, and the last token before a branch is always computed again. A segment that would
        change by more than half keeps its length.
        """
        block = self.continuations.engine.info.block_tokens
        behind = (len(self.continuations.prompt) + len(node.response) + segment - 1) % block
        shift = -behind if 2 * behind <= block else block - behind
        return segment + shift if 2 * abs(shift) <= segment else segment

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


def _put(
    ended: asyncio.Queue[tuple[int, Completion]], start: int, sample: int, done: Completion
) -> None:
    """A continuation that has ended, by its position among its siblings."""
    ended.put_nowait((start + sample, done))


def _nobody(path: Path, branch: Branch) -> None:
    """Told of nodes where nobody asked."""


def _tell_all(root: Branch, tell: Callable[[Path, Branch], None]) -> None:
    """Tell of all nodes below a finished root, parents first."""
    waiting: list[tuple[Path, Branch]] = [((), root)]
    while waiting:
        path, branch = waiting.pop()
        if path:
            tell(path, branch)
        waiting.extend(((*path, at), child) for at, child in enumerate(branch.children))
