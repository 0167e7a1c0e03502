"""How a batch is averaged, against a twin that knows no micro-batches; and rows cut to what a loss reads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.averaging import denominators, weights
from trainer.losses import policy_loss
from trainer.packing import Row, collate, micro_batches, needed, participating_tokens, rows
from trainer.settings import Average
from trainer.whiten import whiten_rows

MAX_TOKENS = 7


def made_rows(trees, threshold=0.9):
    segments = [
        Segment(tree=tree, node_id=node.id, advantage=(-1.0) ** node.id * (0.5 + node.id))
        for tree in trees
        for node in tree.nodes[1:]
    ]
    return rows(segments, mask_threshold=threshold)


def loss_of(micros, average, whole):
    """The loss as the learner adds it up, the logprobs being the behaviour's."""
    loss = 0.0
    divide = denominators(micros, average, rows=len(whole), max_tokens=MAX_TOKENS)
    for micro, denominator in zip(micros, divide, strict=True):
        batch = collate(micro, 0, "cpu")
        logprobs = batch.behaviour_logprobs.double().requires_grad_()
        part = policy_loss(
            logprobs,
            batch.behaviour_logprobs.double(),
            batch.advantages,
            batch.participates,
            denominator=denominator,
            weights=weights(batch.participates, average),
        ).loss
        loss += float(part.detach())
    return loss


def twin(whole, average):
    """The loss at ratio 1, by the definitions: a token's loss is minus its advantage."""
    tokens = [[-a for a, p in zip(r.advantages, r.participates, strict=True) if p] for r in whole]
    used = [row for row in tokens if row]
    if not used:
        return 0.0
    if average is Average.TOKEN:
        return math.fsum(x for row in used for x in row) / sum(map(len, used))
    if average is Average.SEQUENCE:
        return math.fsum(math.fsum(row) / len(row) for row in used) / len(used)
    return math.fsum(x for row in used for x in row) / (len(whole) * MAX_TOKENS)


@naive.examples
@given(
    st.lists(naive.trees(max_nodes=5, branched=False), min_size=1, max_size=3),
    st.sampled_from([Average.TOKEN, Average.SEQUENCE, Average.CONSTANT]),
    st.integers(1, 60),
)
def test_the_loss_is_the_twins_however_it_is_cut(trees, average, budget):
    whole = made_rows(trees)
    if not participating_tokens(whole):
        return
    loss = loss_of(micro_batches(needed(whole), token_budget=budget), average, whole)
    assert loss == pytest.approx(twin(whole, average), rel=1e-5, abs=1e-6)


def test_the_authors_average_depends_on_the_cut():
    whole = made_rows([naive.make_tree([0, 0], [1, 3], [1.0, 0.0])])
    together = loss_of([whole], Average.MICRO_BATCH, whole)
    apart = loss_of([[row] for row in whole], Average.MICRO_BATCH, whole)
    # Advantages -1.5 and 2.5 on 1 and 3 tokens: mean of tokens, and mean of the two means.
    assert together == pytest.approx((1.5 - 3 * 2.5) / 4)
    assert apart == pytest.approx((1.5 - 2.5) / 2)


@naive.examples
@given(st.lists(naive.trees(max_nodes=6), min_size=1, max_size=3))
def test_what_is_cut_away_changes_nothing(trees):
    whole = whiten_rows(made_rows(trees))
    used = needed(whole)
    assert participating_tokens(used) == participating_tokens(whole)
    assert all(row.participates[-1] for row in used)
    kept = [row for row in whole if row.participates.any()]
    for short, row in zip(used, kept, strict=True):
        for name in Row.__slots__:
            assert np.array_equal(getattr(short, name), getattr(row, name)[: len(short)])
        assert not row.participates[len(short) :].any()


def test_a_model_gives_the_same_gradient_for_cut_rows(tiny_math):
    from trainer.policy import load_policy, token_logprobs

    policy = load_policy(tiny_math)
    whole = made_rows([naive.make_tree([0, 1, 1], [4, 5, 3], [None, 1.0, 0.0],
                       logprobs=[[-1.0, 0, 0, -0.7], [-0.3, 0, 0, 0, 0], [0, -2.0, 0]])])  # fmt: skip

    def gradient(chosen):
        batch = collate(chosen, 0, "cpu")
        policy.zero_grad()
        result = policy_loss(
            token_logprobs(policy, batch), batch.behaviour_logprobs, batch.advantages,
            batch.participates, denominator=participating_tokens(whole),
        )  # fmt: skip
        result.loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    full, cut = gradient(whole), gradient(needed(whole))
    assert sum(map(len, needed(whole))) < sum(map(len, whole))
    assert torch.allclose(full, cut, atol=1e-5 * float(full.abs().max()))
