"""Values and gradients of every estimator against exact ones, on a policy that can be enumerated.

Seeds are fixed, so a result never changes by itself. A mean over n independent trees is held to within 4.5
standard errors of its exact value, and each kind of check is shown to fail for an estimator with a planted bias.
"""

import asyncio
import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given

from shared.tree import Role, RolloutTree
from shared.wire import ChainPlan, CutpointsPartition, FixedPartition, Plan
from tests.numerics import naive
from tests.numerics.enumerable import HORIZON, PROMPT, STATES, Table
from tests.numerics.estimators import (
    CUTPOINTS,
    FIXED,
    RHO,
    TREE,
    Estimator,
    chain_advantages,
    estimators,
    expected_gradient,
    segment_advantages,
)
from tests.numerics.gradients import (
    Packed,
    batch_gradient,
    branching_weights,
    cosine,
    packed,
    signal,
    states_of,
)
from tests.numerics.table_engine import sampled
from trainer.algorithms import AlgorithmSettings, Segment, advantages
from trainer.algorithms.base import values
from trainer.losses import policy_loss
from trainer.packing import collate, rows
from trainer.whiten import whiten_rows

TABLE = Table.seeded(0)
TREES = 1000
Z = 4.5
LINEAR = [e for e in estimators(TABLE) if e.expected is not None]


SAMPLED: dict[str, list[RolloutTree]] = {}


def of(plan: Plan) -> list[RolloutTree]:
    """The plan's trees, sampled once for all tests."""
    name = plan.model_dump_json()
    if name not in SAMPLED:
        drawn = asyncio.run(sampled(TABLE, plan, TREES, seed=10**6))
        SAMPLED[name] = [one.tree for one in drawn]
    return SAMPLED[name]


def z_scores(samples: np.ndarray, exact: np.ndarray | float = 0.0) -> np.ndarray:
    """Of the means of independent samples [n, ...]."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    return (samples.mean(0) - exact) / np.maximum(error, 1e-12)


def test_the_enumeration_is_right():
    logits = torch.tensor(TABLE.logits, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    mean = torch.zeros((), dtype=torch.float64)
    for question in range(TABLE.questions):
        responses = list(TABLE.responses(question))
        assert sum(r.probability for r in responses) == pytest.approx(1, abs=1e-12)
        for r in responses:
            steps = [(s, t) for s, t in zip(r.states, r.tokens, strict=False) if s < STATES]
            total = sum(logprobs[question, s, t] for s, t in steps)
            mean = mean + torch.exp(torch.as_tensor(total)) * r.reward / TABLE.questions
    mean.backward()
    assert float(mean.detach()) == pytest.approx(fmean(v[()] for v in TABLE.values), abs=1e-12)
    np.testing.assert_allclose(TABLE.gradient, logits.grad.numpy().ravel(), atol=1e-12)
    assert all(0.05 < v[()] < 0.95 for v in TABLE.values), "questions with something to learn"


def estimated(tree: RolloutTree, known: list[float | None]) -> dict[tuple[int, ...], list[float]]:
    """Value estimates above the leaves, by state."""
    found: dict[tuple[int, ...], list[float]] = {}
    for node in tree.nodes:
        value = known[node.id]
        if tree.children[node.id] and value is not None:
            found.setdefault(tuple(tree.response_token_ids(node.id)), []).append(value)
    return found


def value_scores(plan: Plan, values_of) -> dict[tuple[int, tuple[int, ...]], float]:
    """The z-score of each (question, state) that enough trees reach to call its mean normal."""
    errors: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for tree in of(plan):
        question = tree.prompt_token_ids[0] - PROMPT
        for state, found in estimated(tree, values_of(tree)).items():
            # One number for each tree: nodes of one tree that stand at the same state are not independent.
            errors.setdefault((question, state), []).append(
                fmean(found) - TABLE.values[question][state]
            )
    enough = {}
    for (question, state), samples in errors.items():
        v = TABLE.values[question][state]
        if len(samples) * v * (1 - v) >= 15:
            enough[question, state] = float(z_scores(np.array(samples)))
    return enough


def chain_values_of(tree: RolloutTree) -> list[float | None]:
    return [node.value for node in tree.with_values(chain=True).nodes]


@pytest.mark.parametrize(
    ("plan", "values_of"),
    [(TREE, values), (CUTPOINTS, chain_values_of), (FIXED, chain_values_of)],
    ids=["tree", "cutpoints", "fixed"],
)
def test_values_converge_to_the_exact_ones(plan, values_of):
    scores = value_scores(plan, values_of)
    assert len(scores) >= 8
    assert max(map(abs, scores.values())) < Z
    # Honest z-scores are about one in size: much less would mean that the test sees nothing.
    assert 0.5 < math.sqrt(fmean(z * z for z in scores.values())) < 1.5


def mean_of_leaves(tree: RolloutTree) -> list[float | None]:
    """A mistake that is easily made: leaves that ended early count once, their siblings by their leaves."""
    below: list[list[float]] = [[] for _ in tree.nodes]
    for leaf in tree.leaves():
        assert leaf.reward is not None
        for node in (tree.nodes[0], *tree.path(leaf.id)):
            below[node.id].append(leaf.reward)
    return [fmean(rewards) for rewards in below]


def own_reward_as_rollout(tree: RolloutTree) -> list[float | None]:
    """Another: the response that is being judged serves as one more rollout of its boundaries."""
    known = chain_values_of(tree)
    for leaf in tree.leaves():
        if leaf.role is Role.SEGMENT:
            for node in tree.path(leaf.id)[:-1]:
                value = known[node.id]
                if value is not None:
                    known[node.id] = (3 * value + leaf.reward) / 4
    return known


def test_a_planted_bias_in_the_values_is_seen():
    assert max(map(abs, value_scores(TREE, mean_of_leaves).values())) > Z


def test_own_reward_as_rollout_biases_no_value_but_every_advantage():
    assert max(map(abs, value_scores(FIXED, own_reward_as_rollout).values())) < Z

    def segments(tree: RolloutTree) -> list[Segment]:
        known = own_reward_as_rollout(tree)
        return [
            Segment(tree=tree, node_id=n.id, advantage=known[n.id] - (known[n.parent] or 0.0))
            for n in tree.nodes[1:]
            if n.role is Role.SEGMENT and known[n.id] is not None and known[n.parent] is not None
        ]

    biased = replace(by_name("vineppo, fixed 2"), segments=segments)
    assert np.abs(gradient_scores(biased, None)).max() > Z


def by_name(name: str) -> Estimator:
    return next(e for e in estimators(TABLE) if e.name == name)


def gradients(found: list[Packed], rho: float | None) -> np.ndarray:
    """[n, P] independent gradients: each of one tree for every question, summed and not averaged over tokens."""
    size = TABLE.questions
    return np.array([batch_gradient(TABLE, batch.masked(rho), denominator=size) for batch in found])


def batches(estimator: Estimator) -> list[Packed]:
    """One tree for every question in each, all tokens taking part."""
    size, found = TABLE.questions, of(estimator.plan)
    return [
        packed([s for t in found[start : start + size] for s in estimator.segments(t)], rho=None)
        for start in range(0, len(found), size)
    ]


def directions() -> np.ndarray:
    """[P, 24] what gradients are projected on: the exact one by depth and by question, and random ones."""
    exact = TABLE.gradient.reshape(TABLE.questions, STATES, 3)
    depth = np.array([(state + 1).bit_length() - 1 for state in range(STATES)])
    parts = [exact * (depth == d)[None, :, None] for d in range(HORIZON)]
    parts += [
        exact * (np.arange(TABLE.questions) == q)[:, None, None] for q in range(TABLE.questions)
    ]
    noise = np.random.default_rng(1).normal(size=(14, exact.size))
    return np.array([part.ravel() for part in parts] + list(noise)).T


def gradient_scores(
    estimator: Estimator, rho: float | None, found: list[Packed] | None = None
) -> np.ndarray:
    exact = expected_gradient(TABLE, estimator, rho)
    assert exact is not None
    onto = directions()
    found = batches(estimator) if found is None else found
    return z_scores(gradients(found, rho) @ onto, exact @ onto)


@pytest.mark.parametrize("estimator", LINEAR, ids=lambda e: e.name)
def test_gradients_have_the_expectation_that_enumeration_gives(estimator):
    found = batches(estimator)
    for rho in (None, RHO):
        assert np.abs(gradient_scores(estimator, rho, found)).max() < Z


@pytest.mark.parametrize("estimator", LINEAR, ids=lambda e: e.name)
def test_which_estimators_are_unbiased_up_to_a_factor(estimator):
    mean = expected_gradient(TABLE, estimator, None)
    assert mean is not None
    off = 1 - cosine(mean, TABLE.gradient)
    assert abs(off) < 1e-12 if estimator.unbiased else 1e-4 < off < 0.2


def test_even_weights_matter():
    plain, even = (
        by_name("spo_tree 4-2-2, difference"),
        by_name("spo_tree 4-2-2, unbiased"),
    )
    swapped = replace(plain, expected=even.expected)
    assert np.abs(gradient_scores(swapped, None)).max() > 2 * Z


def cut_behind(question: int, response) -> list[int]:
    """Boundaries behind every second cutpoint: known without the next token."""
    cut = [t for t, logprob in enumerate(response.logprobs) if logprob < math.log(RHO)]
    behind = (t + 1 for t in cut[::2])
    return [0, *(b for b in behind if b < len(response.tokens))]


def test_the_bias_of_cutpoints_is_that_a_boundary_depends_on_the_token_behind_it():
    before = TABLE.expected(chain_advantages(TABLE, CUTPOINTS.partition))
    behind = TABLE.expected(segment_advantages(TABLE, cut_behind))
    assert 1e-4 < 1 - cosine(before, TABLE.gradient) < 0.01
    np.testing.assert_allclose(behind, TABLE.gradient, atol=1e-12)
    # A threshold of 1 makes every token a cutpoint, so that no boundary depends on what was sampled.
    every = CutpointsPartition(threshold=1.0, interval=2)
    np.testing.assert_allclose(
        TABLE.expected(chain_advantages(TABLE, every)), TABLE.gradient, atol=1e-12
    )
    assert ChainPlan(samples=2, partition=FixedPartition(tokens=2), value_rollouts=3) == FIXED


@pytest.mark.parametrize("rho", [None, RHO], ids=["all tokens", "mask"])
@pytest.mark.parametrize("whiten", [False, True], ids=["plain", "whitened"])
def test_the_table_s_gradient_is_that_of_the_padded_batch(rho, whiten):
    segments = [
        s for tree in of(TREE)[:24] for s in advantages(tree, AlgorithmSettings(name="spo_tree"))
    ]
    made = rows(segments, mask_threshold=rho)
    if whiten:
        made = whiten_rows(made)
    batch = collate(made, 0, "cpu")
    logits = torch.tensor(TABLE.logits.reshape(-1, 3), requires_grad=True)
    table = logits.log_softmax(-1)
    logprobs = torch.zeros(batch.token_ids.shape, dtype=torch.float64)
    for row, (tokens, response) in enumerate(zip(batch.token_ids, batch.response, strict=True)):
        places = states_of(tokens.numpy(), response.numpy())
        for t, place in zip(response.nonzero()[:, 0].tolist(), places, strict=True):
            if place >= 0:
                logprobs[row, t] = table[place, tokens[t]]
    result = policy_loss(
        logprobs, batch.behaviour_logprobs, batch.advantages, batch.participates,
        denominator=float(batch.participates.sum()),
    )  # fmt: skip
    result.loss.backward()
    fast = batch_gradient(TABLE, packed(segments, rho=rho, whiten=whiten))
    np.testing.assert_allclose(fast, -logits.grad.numpy().ravel(), atol=1e-7)
    assert abs(fast).max() > 1e-3


def test_branching_weights_of_an_uneven_tree():
    nodes = [{"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [3]}]
    for parent, depth in ((0, 1), (0, 1), (1, 2), (1, 2), (1, 2), (3, 3)):
        nodes.append({"id": len(nodes), "parent": parent, "depth": depth, "token_ids": [0]})
    tree = RolloutTree.model_validate({"nodes": nodes})
    assert branching_weights(tree) == [0.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.0]


@naive.examples
@given(naive.trees())
def test_the_unbiased_advantage_is_the_difference_by_these_weights(tree):
    def found(kind):
        settings = AlgorithmSettings(advantage=kind, drop_zero=False)
        return {s.node_id: s.advantage for s in advantages(tree, settings)}

    weights = branching_weights(tree)
    expected = {node_id: a * weights[node_id] for node_id, a in found("difference").items()}
    assert found("unbiased") == pytest.approx(expected, abs=1e-12)


def test_signal_is_without_bias():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(2000):
        blocks = rng.normal(size=(6, 10)) * 2.0
        blocks[:, 0] += 1.5
        found.append(signal(blocks @ blocks.T))
    assert np.abs(z_scores(np.array(found), np.array([1.5**2, 10 * 4.0]))).max() < Z


def test_joining_keeps_the_order():
    segments = [s for t in of(TREE)[:2] for s in advantages(t, AlgorithmSettings())]
    parts = [packed([s], rho=None) for s in segments]
    joined = Packed.joined(parts)
    assert joined.token.tolist() == [x for part in parts for x in part.token.tolist()]
