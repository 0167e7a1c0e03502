"""The algorithms on the enumerable policy: how each makes segments of a tree, and what it should give on average.

An estimator that is linear in the rewards has an expectation that enumeration gives exactly: the sum over all
responses of probability x advantage x ∇logprob, with exact values in the place of sampled ones. GRPO and the
normalised tree advantage divide by a sampled standard deviation and have none in closed form.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.partition import boundaries, segments
from shared.tree import RolloutTree
from shared.wire import (
    ChainPlan,
    CutpointsPartition,
    FixedPartition,
    GroupPlan,
    Partition,
    Plan,
    TreePlan,
)
from tests.numerics.enumerable import PROMPT, Response, Table, TokenAdvantages, Vector
from trainer.algorithms import AlgorithmSettings, Segment, advantages
from trainer.algorithms.base import TokenTargets
from trainer.algorithms.ppo import gae
from trainer.algorithms.ppo import responses as ppo_responses

RHO = 0.9
GROUP = GroupPlan(samples=8)
TREE = TreePlan(branch_factors=[4, 2, 2], segment_tokens=2)
CUTPOINTS = ChainPlan(
    samples=2, partition=CutpointsPartition(threshold=RHO, interval=2), value_rollouts=3
)
FIXED = ChainPlan(samples=2, partition=FixedPartition(tokens=2), value_rollouts=3)

Segments = Callable[[RolloutTree], list[Segment]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One way to a gradient."""

    name: str
    plan: Plan
    segments: Segments
    expected: TokenAdvantages | None
    """Each token's expected advantage times how often a tree holds it; None where there is no closed form."""
    unbiased: bool
    """Without the mask the expectation is the exact gradient up to a factor."""


def estimators(table: Table) -> list[Estimator]:
    """All of them; PPO's critics are the exact values, and these with a fixed error of 0.3 on average."""
    rng = np.random.default_rng(7)
    exact = table.values
    wrong = [{state: v + 0.3 * rng.normal() for state, v in known.items()} for known in exact]
    found = [
        Estimator(
            name="rloo",
            plan=GROUP,
            segments=_plain(name="rloo"),
            expected=_response_minus_prompt(table, GROUP.samples),
            unbiased=True,
        ),
        Estimator(
            name="grpo", plan=GROUP, segments=_plain(name="grpo"), expected=None, unbiased=False
        ),
        Estimator(
            name="vineppo, fixed 2",
            plan=FIXED,
            segments=_plain(name="vineppo"),
            expected=chain_advantages(table, FIXED.partition, FIXED.samples),
            unbiased=True,
        ),
        Estimator(
            name="spo_chain, cutpoints 2",
            plan=CUTPOINTS,
            segments=_plain(name="spo_chain"),
            expected=chain_advantages(table, CUTPOINTS.partition, CUTPOINTS.samples),
            unbiased=False,
        ),
        Estimator(
            name="spo_tree 4-2-2, difference",
            plan=TREE,
            segments=_plain(name="spo_tree"),
            expected=tree_advantages(table, TREE, even=False),
            unbiased=False,
        ),
        Estimator(
            name="spo_tree 4-2-2, unbiased",
            plan=TREE,
            segments=_plain(name="spo_tree", advantage="unbiased"),
            expected=tree_advantages(table, TREE, even=True),
            unbiased=True,
        ),
        Estimator(
            name="spo_tree 4-2-2, normalised",
            plan=TREE,
            segments=_plain(name="spo_tree", advantage="normalised"),
            expected=None,
            unbiased=False,
        ),
    ]
    for name, critic in (("exact critic", exact), ("critic ± 0.3", wrong)):
        for lam in (1.0, 0.95):
            found.append(
                Estimator(
                    name=f"ppo, {name}, lambda {lam:g}",
                    plan=GROUP,
                    segments=_ppo(critic, lam),
                    expected=_ppo_advantages(critic, lam, GROUP.samples),
                    unbiased=critic is exact or lam == 1.0,
                )
            )
    return found


def _plain(**settings: str) -> Segments:
    read = AlgorithmSettings.model_validate(settings)
    return lambda tree: advantages(tree, read)


Critic = Sequence[dict[tuple[int, ...], float]]


def _ppo(critic: Critic, lam: float) -> Segments:
    def segments_of(tree: RolloutTree) -> list[Segment]:
        question = tree.prompt_token_ids[0] - PROMPT
        made = []
        for segment in ppo_responses(tree):
            values = _critic_values(critic, question, segment.node.token_ids)
            own, returns = gae(values, segment.advantage, gamma=1.0, lam=lam)
            targets = TokenTargets(advantages=own, values=values, returns=returns)
            made.append(replace(segment, tokens=targets))
        return made

    return segments_of


def _critic_values(critic: Critic, question: int, tokens: Sequence[int]) -> Vector:
    return np.array([critic[question][tuple(tokens[:t])] for t in range(len(tokens))])


def _ppo_advantages(critic: Critic, lam: float, samples: int) -> TokenAdvantages:
    """By the sum of discounted errors as it is written, not by the recursion of `gae`."""

    def of(question: int, response: Response) -> list[float]:
        values = [*_critic_values(critic, question, response.tokens), response.reward]
        errors = np.diff(values)
        return [
            samples * sum(lam**k * error for k, error in enumerate(errors[t:]))
            for t in range(len(errors))
        ]

    return of


def _response_minus_prompt(table: Table, samples: int) -> TokenAdvantages:
    def of(question: int, response: Response) -> list[float]:
        return [samples * (response.reward - table.values[question][()])] * len(response.tokens)

    return of


def chain_advantages(table: Table, partition: Partition, samples: int = 1) -> TokenAdvantages:
    """V(end) - V(start) of a token's segment; 0 before the first boundary."""
    return segment_advantages(
        table, lambda _, response: boundaries(partition, response.logprobs), samples
    )


def segment_advantages(
    table: Table, placed: Callable[[int, Response], Sequence[int]], samples: int = 1
) -> TokenAdvantages:
    """The same for boundaries by any rule."""

    def of(question: int, response: Response) -> list[float]:
        found = list(placed(question, response))
        own: list[float] = []
        for start, end in segments(found, len(response.tokens)):
            values = [table.values[question][response.tokens[:at]] for at in (start, end)]
            credit = samples * (values[1] - values[0]) if start in found else 0.0
            own += [credit] * (end - start)
        return own

    return of


def tree_advantages(table: Table, plan: TreePlan, *, even: bool) -> TokenAdvantages:
    """V(end) - V(start) times the nodes at the segment's depth, times (b - 1) / b for a parent that includes it.

    Args:
        table: the policy.
        plan: of the tree.
        even: with `branching_weights`, which leave a factor of 1 everywhere.
    """

    def of(question: int, response: Response) -> list[float]:
        length, own, nodes = len(response.tokens), list[float](), 1.0
        for depth, factor in enumerate(plan.branch_factors):
            nodes *= factor
            start = min(depth * plan.segment_tokens, length)
            last = depth == len(plan.branch_factors) - 1
            end = length if last else min(start + plan.segment_tokens, length)
            values = [table.values[question][response.tokens[:at]] for at in (start, end)]
            count = 1.0 if even else nodes * (factor - 1) / factor
            own += [count * (values[1] - values[0])] * (end - start)
        return own

    return of


def expected_gradient(table: Table, estimator: Estimator, rho: float | None) -> Vector | None:
    """[P] of one tree, on average over the questions; None where there is no closed form."""
    return None if estimator.expected is None else table.expected(estimator.expected, rho)
