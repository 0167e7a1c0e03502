"""AdamW against a scalar loop, masters, clipping, the schedule, skipped steps, and resuming bit for bit."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.numerics import naive
from trainer.optimizer import PolicyOptimizer, learning_rate
from trainer.settings import OptimizerSettings

PLAIN = {"warmup_ratio": 0.0, "decay": "constant"}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def backward(model, step, scale=1.0):
    """The gradient of step `step`, in two micro-batches."""
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(step))
    for part in inputs:
        (scale * model(part.to(model[0].weight.dtype)).square().sum()).backward()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def optimizer_of(model, total_steps=6, **options):
    return PolicyOptimizer(model, OptimizerSettings(**options), total_steps=total_steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_steps_a_checkpoint_and_three_more_are_six(dtype):
    options = {"learning_rate": 1e-2, "warmup_steps": 2, "decay": "cosine", "weight_decay": 0.1}
    straight = network(dtype)
    optimizer = optimizer_of(straight, **options)
    for step in range(6):
        backward(straight, step)
        report = optimizer.step()
        if step == 2:
            file = io.BytesIO()
            torch.save((optimizer.state_dict(), straight.state_dict()), file)
    file.seek(0)
    state, saved = torch.load(file, weights_only=True)
    resumed = network(dtype)
    resumed.load_state_dict(saved)
    second = optimizer_of(resumed, **options)
    second.load_state_dict(state)
    for step in range(3, 6):
        backward(resumed, step)
        again = second.step()
    assert equal(weights(straight), weights(resumed))
    assert again == report
    assert second.steps == optimizer.steps == 6


def test_loading_writes_the_masters_to_the_model():
    model, other = network(torch.bfloat16), network(torch.bfloat16)
    optimizer = optimizer_of(model, learning_rate=0.1, **PLAIN)
    backward(model, 0)
    optimizer.step()
    assert not equal(weights(model), weights(other))
    optimizer_of(other).load_state_dict(optimizer.state_dict())
    assert equal(weights(model), weights(other))


def test_a_step_is_as_long_as_the_schedule_says():
    """Under a constant gradient AdamW moves a weight by the learning rate."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = optimizer_of(model, learning_rate=0.1, warmup_steps=2, total_steps=6)
    for _ in range(6):
        before = model.weight.item()
        model.weight.sum().backward()
        rate = optimizer.step().learning_rate
        assert before - model.weight.item() == pytest.approx(rate, rel=1e-4)


def test_a_state_of_another_model_is_refused():
    optimizer, other = optimizer_of(network(torch.bfloat16)), optimizer_of(network())
    with pytest.raises(ValueError, match="another shape or precision"):
        other.load_state_dict(optimizer.state_dict())


def scalar_adam(weight, gradients, *, rate, decay, clip, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW on one number."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        g *= min(1.0, clip / (abs(g) + 1e-6))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        weight -= rate * decay * weight
        weight -= rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return weight


def test_steps_are_those_of_a_scalar_loop():
    gradients = [0.5, -3.0, 0.25, 7.0, 1e-3]
    model = nn.Linear(1, 1, bias=False)
    start = model.weight.item()
    optimizer = optimizer_of(
        model, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0, total_steps=5, **PLAIN
    )
    for gradient in gradients:
        (model.weight * gradient).sum().backward()
        assert optimizer.step().gradient_norm == pytest.approx(abs(gradient))
    expected = scalar_adam(start, gradients, rate=0.01, decay=0.1, clip=1.0)
    assert model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_clipping_scales_the_whole_gradient():
    """Seen through AdamW by its first moment."""
    clipped, free = network(), network()
    optimizers = [
        optimizer_of(clipped, clip_norm=0.5, **PLAIN),
        optimizer_of(free, clip_norm=None, **PLAIN),
    ]
    moments = []
    for model, optimizer in zip((clipped, free), optimizers, strict=True):
        backward(model, 0)
        gradients = [p.grad.clone() for p in model.parameters()]
        norm = optimizer.step().gradient_norm
        assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients)))
        assert norm > 0.5
        state = optimizer.state_dict()["adam"]["state"]
        moments.append([state[i]["exp_avg"] for i in range(4)])
    for small, large in zip(*moments, strict=True):
        torch.testing.assert_close(small, large * 0.5 / norm)


def test_masters_keep_what_bf16_would_lose():
    """Steps far below bf16's grain, 1/128 at a weight of 1, still add up."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = optimizer_of(model, learning_rate=1e-3, total_steps=100, **PLAIN)
    seen = set()
    for _ in range(20):
        model.weight.sum().backward()
        optimizer.step()
        seen.add(model.weight.item())
    (master,) = optimizer.state_dict()["masters"]
    assert master.item() == pytest.approx(0.98, abs=1e-5)
    assert model.weight.item() == torch.tensor(0.98).bfloat16().item()
    assert len(seen) < 20, "single steps are too small for bf16"


def test_a_bf16_model_follows_the_float32_gradient_sum():
    """1 + 256 times 2^-9 is 1.5; in bf16 each addition would round back to 1."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = optimizer_of(model, clip_norm=None, **PLAIN)
    for gradient in [1.0] + [2**-9] * 256:
        (model.weight * gradient).sum().backward()
    assert optimizer.step().gradient_norm == 1.5
    assert model.weight.grad is None


def test_a_float32_model_has_no_second_copy():
    model = network()
    optimizer = optimizer_of(model)
    assert optimizer.state_dict()["masters"] == []
    before = [p.data_ptr() for p in model.parameters()]
    backward(model, 0)
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(dtype, bad):
    model = network(dtype)
    optimizer = optimizer_of(model, learning_rate=0.1, **PLAIN)
    backward(model, 0)
    optimizer.step()
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict()["adam"])
    backward(model, 1, scale=bad)
    report = optimizer.step()
    assert report.skipped
    assert not math.isfinite(report.gradient_norm)
    assert equal(before, weights(model))
    after = optimizer.state_dict()["adam"]
    for i, state in moments["state"].items():
        assert all(torch.equal(value, after["state"][i][key]) for key, value in state.items())
    assert (optimizer.steps, optimizer.skipped) == (2, 1)
    backward(model, 2)
    assert not optimizer.step().skipped
    assert not equal(before, weights(model))


def test_skipping_drops_the_gradient_and_the_schedule_goes_on():
    model, twin = network(), network()
    options = {"learning_rate": 0.1, "warmup_steps": 4}
    optimizer, other = optimizer_of(model, **options), optimizer_of(twin, **options)
    backward(model, 0, scale=1e6)
    assert optimizer.skip().learning_rate == other.skip().learning_rate == pytest.approx(0.025)
    for one, its in ((model, optimizer), (twin, other)):
        backward(one, 1)
        assert its.step().learning_rate == pytest.approx(0.05)
    assert equal(weights(model), weights(twin))


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = weights(model)
    optimizer = optimizer_of(model, learning_rate=0.1, **PLAIN)
    backward(model, 0)
    optimizer.step()
    after = weights(model)
    assert equal(before[:2], after[:2])
    assert not equal(before[2:], after[2:])


@naive.examples
@given(
    st.integers(1, 40),
    st.integers(0, 40),
    st.floats(0, 1),
    st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_schedule_is_its_definition(total, warm, floor, decay):
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=warm, floor=floor, decay=decay)
    for step in range(total + 3):
        ours = learning_rate(settings, step, total)
        if warm < total:
            assert ours == pytest.approx(
                naive.rate(2.0, warm, total, floor, decay, step), abs=1e-12
            )
        assert 0 <= ours <= 2.0


def test_the_ratio_sets_the_warm_up_where_no_steps_are_given():
    by_ratio = OptimizerSettings(warmup_ratio=0.1)
    by_steps = OptimizerSettings(warmup_ratio=0.5, warmup_steps=3)
    for step in range(30):
        assert learning_rate(by_ratio, step, 30) == learning_rate(by_steps, step, 30)
