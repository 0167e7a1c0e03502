"""Packed rows against one segment at a time, on the real tiny model: same logprobs, same gradients."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.numerics import naive
from trainer.algorithms import AlgorithmSettings, advantages
from trainer.losses import policy_loss, total
from trainer.packing import collate, micro_batches, participating_tokens, rows
from trainer.policy import token_logprobs
from trainer.whiten import whiten_rows

THRESHOLD = 0.9


SHAPES = [
    ([0, 1, 2, 2, 1, 5, 0, 7], [0, 0, 1.0, 0.0, 0, 1.0, 0, 0.0]),
    ([0, 0, 1, 1], [0, 1.0, 0.0, 1.0]),
]
"""Parents and rewards of two trees."""
STORIES = [
    "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "Tom has 30 coins. He loses 4. He finds 9 more. How many coins does Tom have now?\n",
]


def sample(model, ids, count, generator):
    """Tokens drawn from the model, and their logprobs, one forward pass each."""
    tokens, logprobs = [], []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, -1]
        chances = logits.softmax(-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        logprobs.append(float(chances[tokens[-1]].log()))
    return tokens, logprobs


@pytest.fixture(scope="module")
def segments(model, tiny_math):
    """Every segment of two trees that the model sampled; behaviour logprobs a little off its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_math)
    generator, rng, made = torch.Generator().manual_seed(0), np.random.default_rng(0), []
    for story, (parents, rewards) in zip(STORIES, SHAPES, strict=True):
        prompt = tokenizer(story)["input_ids"]
        paths, token_ids, logprobs = [prompt], [], []
        for parent in parents:
            own, given = sample(model, paths[parent], int(rng.integers(3, 12)), generator)
            paths.append(paths[parent] + own)
            token_ids.append(own)
            logprobs.append([min(0.0, x + rng.normal(0, 0.1)) for x in given])
        counts = [len(own) for own in token_ids]
        tree = naive.make_tree(
            parents, counts, rewards, prompt=prompt, token_ids=token_ids, logprobs=logprobs
        )
        made += advantages(tree, AlgorithmSettings(drop_zero=False))
    return made


def by_token(packed, logprobs):
    """(path that ends in it, logprob) of each trained token, sorted: siblings may have drawn the same."""
    return sorted(
        (tuple(row.token_ids[: t + 1].tolist()), scored[t].item())
        for row, scored in zip(packed, logprobs, strict=True)
        for t in row.response.nonzero()[0]
    )


def test_packed_logprobs_are_those_of_one_segment_at_a_time(model, segments):
    packed = rows(segments, mask_threshold=THRESHOLD)
    assert len(packed) < len(segments)
    with torch.no_grad():
        together = by_token(packed, token_logprobs(model, collate(packed, 0, "cpu")))
        alone = []
        for segment in segments:
            (row,) = rows([segment], mask_threshold=THRESHOLD)
            alone += by_token([row], token_logprobs(model, collate([row], 0, "cpu")))
    alone.sort()
    assert [path for path, _ in together] == [path for path, _ in alone]
    assert [x for _, x in together] == pytest.approx([x for _, x in alone], abs=1e-5)


def gradients(model, micro, denominator):
    """Gradients of a copy of the model, and the sums, over micro-batches."""
    policy, sums = copy.deepcopy(model), []
    for part in micro:
        batch = collate(part, 0, "cpu")
        result = policy_loss(
            token_logprobs(policy, batch),
            batch.behaviour_logprobs,
            batch.advantages,
            batch.participates,
            denominator=denominator,
            kl_coef=0.01,
            ref_logprobs=batch.behaviour_logprobs + 0.1,
        )
        result.loss.backward()
        sums.append(result.sums)
    return [p.grad for p in policy.parameters()], total(sums)


def test_gradients_are_the_same_packed_cut_or_one_segment_at_a_time(model, segments):
    packed = whiten_rows(rows(segments, mask_threshold=THRESHOLD))
    single = whiten_rows([row for s in segments for row in rows([s], mask_threshold=THRESHOLD)])
    denominator = participating_tokens(packed)
    assert denominator == participating_tokens(single)
    assert 0 < denominator < sum(row.response.sum() for row in packed), "the mask takes some out"
    whole, sums = gradients(model, [packed], denominator)
    scale = max(gradient.abs().max() for gradient in whole)
    assert scale > 0.1, "the gradients compared are not nothing"
    cut = micro_batches(packed, token_budget=200)
    assert len(cut) > 2
    for micro in (cut, [[row] for row in single]):
        others, other_sums = gradients(model, micro, denominator)
        for ours, theirs in zip(whole, others, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * scale
        assert other_sums.means() == pytest.approx(sums.means(), abs=1e-5)


def test_padding_tokens_change_nothing(model, segments):
    packed = rows(segments, mask_threshold=THRESHOLD)
    with torch.no_grad():
        first, second = (token_logprobs(model, collate(packed, pad, "cpu")) for pad in (0, 17))
    assert torch.equal(first, second)
