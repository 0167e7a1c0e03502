"""PPO: generalised advantages and the value loss against twins, and a critic on a real model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import naive
from trainer.algorithms import AlgorithmSettings, advantages
from trainer.algorithms.ppo import gae, responses
from trainer.critic import Critic, load_critic
from trainer.losses import value_loss
from trainer.optimizer import PolicyOptimizer
from trainer.packing import rows
from trainer.settings import CriticSettings

numbers = st.floats(-3, 3)
share = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@naive.examples
@given(st.lists(numbers, min_size=1, max_size=8), numbers, st.sampled_from([0.9, 1.0]), share)
def test_gae_is_the_double_sum(values, reward, gamma, lam):
    ours, returns = gae(np.array(values), reward, gamma=gamma, lam=lam)
    expected = naive.gae(values, reward, gamma, lam)
    assert ours.tolist() == pytest.approx(expected, abs=1e-9)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)])


@naive.examples
@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=6), st.booleans())
def test_the_value_loss_and_its_gradient_are_the_twins(tokens, clipped):
    clip = 0.2 if clipped else None
    new = torch.tensor([t[0] for t in tokens], dtype=torch.float64, requires_grad=True)
    old, goal = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in (1, 2))
    losses = value_loss(new, old, goal, clip)
    losses.sum().backward()
    for place, (v, v_old, target) in enumerate(tokens):
        plain = (v - target) ** 2 / 2
        near = v_old + max(-0.2, min(0.2, v - v_old)) if clipped else v
        other = (near - target) ** 2 / 2
        assert float(losses[place].detach()) == pytest.approx(max(plain, other), abs=1e-9)
        if plain > other + 1e-9 or not clipped:
            assert float(new.grad[place]) == pytest.approx(v - target, abs=1e-9)
        elif other > plain + 1e-9:
            # Beyond the clip the value may not profit: no gradient.
            assert float(new.grad[place]) == 0.0


def test_a_tree_alone_gives_no_advantages_and_other_plans_are_refused():
    tree = naive.make_tree([0, 0], [2, 0], [1.0, 0.0])
    with pytest.raises(ValueError, match="critic"):
        advantages(tree, AlgorithmSettings(name="ppo"))
    (only,) = responses(tree)
    assert (only.node_id, only.advantage) == (1, 1.0)
    with pytest.raises(ValueError, match=r"cut into segments.*group"):
        responses(naive.make_tree([0, 1], [2, 2], [None, 1.0]))
    with pytest.raises(ValueError, match=r"share node 1.*group"):
        responses(naive.make_tree([0, 1, 1], [2, 2, 2], [None, 1.0, 0.0]))


@pytest.fixture
def critic(tiny_math):
    model = load_critic(tiny_math, torch.float32, "cpu")
    settings = CriticSettings(learning_rate=3e-3, warmup_steps=0, decay="constant")
    optimizer = PolicyOptimizer(model, settings, total_steps=100)
    return Critic(model=model, optimizer=optimizer, settings=settings, token_budget=40)


def test_a_new_critic_says_zero_so_advantages_are_rewards(critic):
    trees = [naive.make_tree([0, 0], [3, 5], [1.0, 0.25], request_id=str(i)) for i in range(2)]
    scored = critic.estimate([s for tree in trees for s in responses(tree)], AlgorithmSettings())
    assert [segment.advantage for segment in scored] == [1.0, 0.25, 1.0, 0.25]
    assert [len(segment.tokens.values) for segment in scored] == [3, 5, 3, 5]
    packed = rows(scored, mask_threshold=None)
    assert packed[1].advantages.tolist() == [0.0] * 3 + [0.25] * 5
    assert packed[1].returns.tolist() == [0.0] * 3 + [0.25] * 5


def test_a_critic_learns_which_response_is_good_and_values_stand_before_their_tokens(critic):
    tree = naive.make_tree([0, 0], [6, 4], [1.0, 0.0])
    losses = []
    for _ in range(60):
        scored = critic.estimate(responses(tree), AlgorithmSettings())
        losses.append(critic.update(rows(scored, mask_threshold=0.9)).loss)
    assert losses[-1] < 0.3 * losses[0]
    good, bad = (
        segment.tokens.values for segment in critic.estimate(responses(tree), AlgorithmSettings())
    )
    # Both start in the same state, so their first values are the same number; then the tokens tell them apart.
    assert good[0] == pytest.approx(bad[0], abs=1e-5)
    assert good[-1] > 0.8
    assert bad[-1] < 0.2
    alone = critic.values(rows(responses(tree)[:1], mask_threshold=None))[0]
    with torch.no_grad():
        ids = torch.tensor([tree.prompt_token_ids + tree.nodes[1].token_ids])
        plain = critic.model(input_ids=ids).logits[0, :, 0].tolist()
    assert alone[1:].tolist() == pytest.approx(plain[:-1], abs=1e-5)
    assert math.isfinite(critic.update(rows(scored, mask_threshold=0.9)).explained_variance)
