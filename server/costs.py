"""What a plan can cost, before it is sampled: the most nodes and tokens that may come of it."""

from dataclasses import dataclass

from shared.errors import RequestError
from shared.wire import ChainPlan, FixedPartition, GroupPlan, Plan, WholePartition


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Size of a tree."""

    nodes: int
    """Continuations, the prompt not counted."""
    tokens: int
    """Sampled in them."""

    def within(self, bound: "Cost") -> bool:
        """Is neither nodes nor tokens above the bound?"""
        return self.nodes <= bound.nodes and self.tokens <= bound.tokens


def most(plan: Plan, response_tokens: int) -> Cost:
    """The most that a plan can come to.

    A chain's boundaries are only known once it is sampled; where they lie at cutpoints or delimiters, only its
    responses are counted here, and `Continuations` counts on while it grows.

    Args:
        plan: of the request.
        response_tokens: most tokens of a response.

    >>> from shared.wire import TreePlan
    >>> most(TreePlan(branch_factors=[2, 3], segment_tokens=10), 15)
    Cost(nodes=8, tokens=50)
    """
    match plan:
        case GroupPlan():
            return Cost(nodes=plan.samples, tokens=plan.samples * response_tokens)
        case ChainPlan():
            return _chain(plan, response_tokens)
    nodes, tokens, level, left = 0, 0, 1, response_tokens
    moved = plan.segment_tokens // 2 if plan.align else 0  # either way, at most
    for depth, factor in enumerate(plan.branch_factors):
        if left == 0:
            break
        last = depth == len(plan.branch_factors) - 1
        level *= factor
        nodes += level
        tokens += level * (left if last else min(plan.segment_tokens + moved, left))
        left -= min(plan.segment_tokens - moved, left)
    return Cost(nodes=nodes, tokens=tokens)


def expected(plan: Plan, response_tokens: int) -> Cost:
    """What a plan lets one expect while nothing is known of the model: the most, or one boundary a response.

    >>> expected(ChainPlan(samples=2, value_rollouts=3), 10)
    Cost(nodes=8, tokens=80)
    """
    if isinstance(plan, ChainPlan):
        nodes = plan.samples * (1 + plan.value_rollouts)
        return Cost(nodes=nodes, tokens=nodes * response_tokens)
    return most(plan, response_tokens)


def _chain(plan: ChainPlan, response_tokens: int) -> Cost:
    match plan.partition:
        case FixedPartition(tokens=segment):
            starts = range(0, response_tokens, segment)
        case WholePartition():
            starts = range(1)
        case _:
            starts = range(0)
    rollouts = plan.samples * plan.value_rollouts
    return Cost(
        nodes=plan.samples + rollouts * len(starts),
        tokens=plan.samples * response_tokens
        + rollouts * sum(response_tokens - start for start in starts),
    )


def over_budget(cost: Cost, budget: Cost) -> RequestError:
    """The refusal (413) of a tree that is too large for this server."""
    return RequestError(
        "plan",
        f"a tree of up to {cost.nodes:,} nodes and {cost.tokens:,} tokens is over this server's budget of "
        f"{budget.nodes:,} nodes and {budget.tokens:,} tokens a tree; ask for fewer branches, shorter "
        "segments or a lower sampling.max_tokens",
        status=413,
    )
