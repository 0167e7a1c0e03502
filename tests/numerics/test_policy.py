"""Scoring with the real tiny model against full logits, and the weights that are taken out of it."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import ConfigError
from tests.numerics import naive
from trainer.algorithms import Segment
from trainer.packing import collate, rows
from trainer.policy import load_policy, recompute_activations, score, state_tensors, token_logprobs


@pytest.fixture
def batch():
    """Two rows of different lengths, one with a context segment that does not train."""
    tree = naive.make_tree(
        [0, 1, 1],
        [3, 4, 9],
        [0, 1.0, 0.0],
        logprobs=[[-1.0] * 3, [-0.01, -1.0, -1.0, -0.01], [-2.0] * 9],
    )
    segments = [Segment(tree=tree, node_id=i, advantage=0.5) for i in (2, 3)]
    return collate(rows(segments, mask_threshold=0.9), 0, "cpu")


def naive_scores(model, batch, temperature):
    """Row by row and token by token, without padding, from the full logits."""
    logprobs, entropy = torch.zeros(batch.response.shape), torch.zeros(batch.response.shape)
    for i, ids in enumerate(batch.token_ids):
        length = int(batch.response[i].nonzero().max()) + 1
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length], use_cache=False).logits[0] / temperature
        for t in range(1, length):
            distribution = torch.distributions.Categorical(logits=logits[t - 1])
            if batch.response[i, t]:
                logprobs[i, t] = distribution.log_prob(ids[t])
            if batch.participates[i, t]:
                entropy[i, t] = distribution.entropy()
    return logprobs, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_the_full_logits(model, batch, temperature):
    scores = score(model, batch, temperature)
    logprobs, entropy = naive_scores(model, batch, temperature)
    assert (scores.logprobs - logprobs).abs().max() < 1e-5
    assert (scores.entropy - entropy).abs().max() < 1e-5
    assert scores.logprobs.dtype == torch.float32
    assert not scores.entropy.requires_grad
    assert torch.equal(token_logprobs(model, batch, temperature), scores.logprobs)


def test_the_vocabulary_is_spread_over_response_tokens_alone(model, batch):
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    score(model, batch)
    handle.remove()
    assert seen == [(1, int(batch.response.sum()), model.config.vocab_size)]
    assert not head._forward_pre_hooks, "the hook on the head must not outlive the call"


def test_a_batch_without_response_tokens_scores_zero(model, batch):
    batch.response.fill_(False)
    batch.participates.fill_(False)
    scores = score(model, batch)
    assert scores.logprobs.count_nonzero() == scores.entropy.count_nonzero() == 0
    scores.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_no_distribution_is_refused(model, batch, temperature):
    with pytest.raises(ValueError, match="temperature is"):
        score(model, batch, temperature)


def test_recomputing_activations_changes_no_gradient(model, batch):
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    recompute_activations(saving)
    calls = []
    saving.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    for one in (plain, saving):
        token_logprobs(one, batch).sum().backward()
    assert len(calls) == 2, "forward, and again in the backward pass"
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny_math", "stories"])
def test_weights_come_out_as_the_checkpoint_names_them(name, request):
    folder = request.getfixturevalue(name)
    policy = load_policy(folder)
    ours, theirs = state_tensors(policy, torch.float32), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)


def test_untied_heads_come_out_too(model):
    untied = copy.deepcopy(model.config)
    untied.tie_word_embeddings = False
    assert "lm_head.weight" in state_tensors(type(model)(untied), torch.float32)


def test_published_weights_are_copies_in_the_asked_precision(model):
    policy = copy.deepcopy(model)
    before = state_tensors(policy, torch.float32)
    rounded = state_tensors(policy, torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    after = state_tensors(policy, torch.float32)
    for name, tensor in before.items():
        assert tensor.is_contiguous()
        assert not torch.equal(tensor, after[name])
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16))


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no model folder"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no model can be loaded from") as caught:
        load_policy(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_model_is_one_clear_line(tmp_path, tiny_math):
    (tmp_path / "config.json").write_text((tiny_math / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="no model can be loaded from"):
        load_policy(tmp_path)
