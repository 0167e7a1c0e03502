"""Is a chain plan's tree cut where its own tokens say, with rollouts where they belong? Part of `tree_checks`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.tree import FinishReason, Node, Role
from shared.wire import ChainPlan, CutpointsPartition, DelimiterPartition, FixedPartition

if TYPE_CHECKING:
    from tests.benchmarks.load_parts.tree_checks import Look


def check_chain(look: "Look", plan: ChainPlan) -> None:
    """Responses cut at the boundaries of their own tokens, with N rollouts at each."""
    starts = [node for node in look.below[0] if node.role is Role.SEGMENT]
    look.is_(len(starts) == plan.samples, None, f"{len(starts)} of {plan.samples} responses")
    rollouts: dict[tuple[int, ...], list[list[int]]] = {}
    due_at_prompt = 0
    for start in starts:
        chain = [start]
        while more := [n for n in look.below[chain[-1].id] if n.role is Role.SEGMENT]:
            look.is_(len(more) == 1, chain[-1], f"{len(more)} segments behind one")
            chain.append(more[0])
        boundaries = _boundaries(look, plan, chain)
        cuts = [len(look.before(node)) for node in chain]
        look.is_(cuts == sorted({0, *boundaries}), start, f"cut at {cuts}, not {boundaries}")
        due_at_prompt = max(due_at_prompt, plan.value_rollouts * (0 in boundaries))
        for node in chain:
            last = node is chain[-1]
            due = 0 if last else plan.value_rollouts
            have = len(look.below[node.id]) - (not last)
            look.is_(have == due, node, f"{have} rollouts, not {due}")
        _response_fills(look, chain)
    have = len(look.below[0]) - len(starts)
    look.is_(have == due_at_prompt, None, f"{have} rollouts of the prompt, not {due_at_prompt}")
    for node in look.nodes:
        mine = [child for child in look.below[node.id] if child.role is Role.ROLLOUT]
        for child in mine:
            look.is_(not look.below[child.id], child, "a rollout with children")
            look.fills(child, look.left(look.before(child)))
        state, sampled = tuple(look.ends_at[node.id]), [child.token_ids for child in mine]
        same = not mine or rollouts.setdefault(state, sampled) == sampled
        look.is_(same, node, "other rollouts than where the same state stands elsewhere")


def _response_fills(look: "Look", chain: Sequence[Node]) -> None:
    """A response stops before its limit by an end token alone; its segments but the last are cut."""
    for node in chain[:-1]:
        look.is_(node.finish_reason is FinishReason.LENGTH, node, "a segment behind the end")
    whole = chain[-1].model_copy(update={"token_ids": look.ends_at[chain[-1].id]})
    look.fills(whole, look.left(()))


def _boundaries(look: "Look", plan: ChainPlan, chain: Sequence[Node]) -> list[int]:
    """Where a response is to be cut, from its tokens and logprobs."""
    tokens = look.ends_at[chain[-1].id]
    match plan.partition:
        case FixedPartition(tokens=every):
            return list(range(0, len(tokens), every))
        case CutpointsPartition(threshold=rho, interval=interval):
            logprobs = [logprob for node in chain for logprob in node.logprobs or []]
            unsure = [t for t, logprob in enumerate(logprobs) if logprob < math.log(rho)]
            return unsure[::interval]
        case DelimiterPartition(delimiter=delimiter):
            seen = [look.truth.decode(tokens[:t]).count(delimiter) for t in range(len(tokens))]
            return [t for t in range(len(tokens)) if t == 0 or seen[t] > seen[t - 1]]
    return [0]
