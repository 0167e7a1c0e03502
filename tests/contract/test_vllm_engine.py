"""What holds for the vLLM engine beyond the contract of both: fused slots, seeds, caches, its known traps."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.engines.base import Completion, GenerateRequest, Weights
from server.engines.settings import EngineSettings
from shared.errors import ConfigError, EngineError, RequestError, WeightsError
from shared.tree import FinishReason

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

PROMPT = tuple(range(5, 70))
"""[65] two blocks of 32 tokens and one more."""

Tensors = dict[str, torch.Tensor]


def ask(**changes) -> GenerateRequest:
    plain = GenerateRequest(
        prompt_token_ids=PROMPT, samples=1, max_tokens=24, temperature=0.0, seed=0
    )
    return replace(plain, **changes)


def logits(tensors: Tensors, folder: Path, prompt: tuple[int, ...], tokens: list[int]):
    """[T, V] logits of a plain forward pass, before each of `tokens`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    with torch.no_grad():
        out = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    return out[len(prompt) - 1 : -1]


def logprobs(rows: torch.Tensor, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    return torch.log_softmax(rows / temperature, -1)[torch.arange(len(tokens)), tokens]


@pytest.fixture(scope="module")
def old(tiny_math: Path) -> Tensors:
    return load_file(tiny_math / "model.safetensors")


@pytest.fixture(scope="module")
def new(old: Tensors) -> Tensors:
    """Every tensor moved by a few percent: another model of the same shape."""
    noise = torch.Generator().manual_seed(1)
    return {
        name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=noise))
        for name, tensor in old.items()
    }


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Weights]:
    def write(tensors: Tensors, version: int = 1) -> Weights:
        names = sorted(tensors)
        files = tuple(tmp_path / f"v{version}-{part}.safetensors" for part in (0, 1))
        for part, file in enumerate(files):
            save_file({name: tensors[name].contiguous() for name in names[part::2]}, file)
        return Weights(version=version, digest=f"digest-{version}", files=files)

    return write


async def test_greedy_is_the_argmax_of_a_plain_forward_pass(vllm_engine, tiny_math, old):
    result = await vllm_engine.generate(ask(max_tokens=100))
    tokens = result.completions[0].token_ids
    rows = logits(old, tiny_math, PROMPT, tokens)
    assert rows.argmax(-1).tolist() == tokens
    torch.testing.assert_close(
        torch.tensor(result.completions[0].logprobs), logprobs(rows, tokens), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("limits", [{}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
async def test_logprobs_are_of_the_distribution_sampled_from(vllm_engine, tiny_math, old, limits):
    request = ask(samples=4, temperature=0.6, seed=11, **limits)
    for completion in (await vllm_engine.generate(request)).completions:
        rows = logits(old, tiny_math, PROMPT, completion.token_ids) / 0.6
        order = rows.sort(-1, descending=True)
        before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
        kept = before < limits.get("top_p", 1.1)
        kept[:, limits.get("top_k", rows.shape[1]) :] = False
        cut = torch.full_like(rows, -torch.inf)
        cut = cut.scatter(1, order.indices, order.values.where(kept, -torch.inf))
        expected = logprobs(cut, completion.token_ids)
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


async def test_sample_i_draws_from_seed_plus_i(vllm_engine):
    three = (await vllm_engine.generate(ask(samples=3, temperature=1.0, seed=7))).completions
    for i, completion in enumerate(three):
        alone = await vllm_engine.generate(ask(temperature=1.0, seed=7 + i))
        assert alone.completions[0].token_ids == completion.token_ids
    assert len({tuple(completion.token_ids) for completion in three}) == 3


async def test_greedy_samples_are_all_the_same(vllm_engine):
    result = await vllm_engine.generate(ask(samples=3))
    assert len(result.completions) == 3
    assert len({tuple(completion.token_ids) for completion in result.completions}) == 1


async def test_seeded_prompts_longer_than_one_step_all_answer(vllm_engine):
    """vLLM cuts prompts that do not fit a step, and on a CPU a cut prompt with a seed would kill the engine."""
    prompts = [(3 + i, *range(20, 320)) for i in range(30)]
    results = await asyncio.gather(
        *(
            vllm_engine.generate(ask(prompt_token_ids=prompt, temperature=1.0, max_tokens=2))
            for prompt in prompts
        )
    )
    assert all(len(result.completions[0].logprobs) >= 1 for result in results)


async def test_reused_prompt_tokens_are_counted_for_every_sample(vllm_engine):
    prompt = (9, *PROMPT[1:])
    cold = await vllm_engine.generate(ask(prompt_token_ids=prompt, samples=3, temperature=1.0))
    assert (cold.computed_prefill_tokens, cold.cached_tokens) == (65 + 1 + 1, 64 + 64)
    warm = await vllm_engine.generate(ask(prompt_token_ids=prompt, samples=3, temperature=1.0))
    assert (warm.computed_prefill_tokens, warm.cached_tokens) == (3, 3 * 64)


async def test_a_stop_string_ends_a_completion(vllm_engine, tiny_math):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_math)
    free = (await vllm_engine.generate(ask(max_tokens=40))).completions[0]
    stop = tokenizer.decode(free.token_ids[10:13])
    stopped = (await vllm_engine.generate(ask(max_tokens=40, stop=(stop,)))).completions[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in tokenizer.decode(stopped.token_ids)
    assert len(stopped.logprobs) == len(stopped.token_ids) < len(free.token_ids)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt_token_ids", {"prompt_token_ids": ()}),
        ("prompt_token_ids", {"prompt_token_ids": (5, 352)}),
        ("prompt_token_ids", {"prompt_token_ids": (-1, 5)}),
        ("prompt_token_ids", {"prompt_token_ids": (5,) * 512}),
        ("samples", {"samples": 0}),
        ("seed", {"seed": -1}),
        ("sampling", {"temperature": 3.0}),
    ],
)
async def test_a_request_that_does_not_fit_names_its_field(vllm_engine, field, changes):
    with pytest.raises(RequestError) as caught:
        await vllm_engine.generate(ask(**changes))
    assert caught.value.field == field


async def test_cancelling_leaves_nothing_in_the_engine(vllm_engine):
    running = asyncio.create_task(
        vllm_engine.generate(ask(samples=8, temperature=1.0, max_tokens=400))
    )
    await vllm_engine.generate(ask(max_tokens=4))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert vllm_engine._llm.get_num_unfinished_requests() == 0
    await vllm_engine.check()


async def test_an_update_in_the_middle_of_requests_is_exact(
    vllm_engine, tiny_math, old, new, publish
):
    weights = publish(new)
    requests = [
        ask(samples=4, temperature=1.0, seed=100 * i, max_tokens=300, prompt_token_ids=prompt)
        for i, prompt in enumerate([PROMPT, PROMPT[:40], PROMPT[::-1]])
    ]
    running = [asyncio.create_task(vllm_engine.generate(request)) for request in requests]
    await vllm_engine.generate(ask(max_tokens=15))  # by now the others have about as many
    report = await vllm_engine.load_weights(weights)
    assert 0 < report.apply_s < report.pause_s
    mixed = 0
    for request, task in zip(requests, running, strict=True):
        for completion in (await task).completions:
            mixed += [version for version, _ in completion.versions] == [0, 1]
            check_versions(completion, request, tiny_math, (old, new))
    assert mixed >= 6
    assert vllm_engine.version == 1


def check_versions(
    completion: Completion, request: GenerateRequest, folder: Path, models: tuple[Tensors, ...]
) -> None:
    """Each token's logprob is that of the version which its span names."""
    start = 0
    for version, count in completion.versions:
        rows = logits(models[version], folder, request.prompt_token_ids, completion.token_ids)
        expected = logprobs(rows, completion.token_ids)[start : start + count]
        found = torch.tensor(completion.logprobs[start : start + count])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        start += count
    assert start == len(completion.token_ids)


async def test_no_key_or_value_of_other_weights_is_reused(
    vllm_engine, tiny_math, new, publish, initial_weights
):
    before = (await vllm_engine.generate(ask())).completions[0].token_ids
    await vllm_engine.load_weights(publish(new))
    after = await vllm_engine.generate(ask())
    assert after.cached_tokens == 0
    tokens = after.completions[0].token_ids
    assert logits(new, tiny_math, PROMPT, tokens).argmax(-1).tolist() == tokens != before
    await vllm_engine.load_weights(initial_weights)
    assert (await vllm_engine.generate(ask())).completions[0].token_ids == before


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


Q, EMBEDDING = "model.layers.2.self_attn.q_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_without(Q), f"{Q} is missing"),
        (lambda t: t | {"model.extra.weight": torch.zeros(2)}, "model.extra.weight is not a"),
        (lambda t: t | {Q: t[Q][:-1]}, f"{Q} has shape"),
        (lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1}, "lm_head.weight differs from"),
    ],
    ids=["missing", "unknown", "shape", "broken tie"],
)
async def test_weights_that_do_not_fit_change_nothing(vllm_engine, new, publish, damage, named):
    before = await vllm_engine.generate(ask())
    with pytest.raises(WeightsError, match=named):
        await vllm_engine.load_weights(publish(damage(new)))
    assert vllm_engine.version == 0
    after = await vllm_engine.generate(ask())
    assert after.completions == before.completions
    assert after.cached_tokens == 64  # sampling was not even paused


async def test_files_that_cannot_be_read_change_nothing(vllm_engine, tmp_path):
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(b"not safetensors")
    for files in ((file,), (tmp_path / "absent.safetensors",)):
        with pytest.raises(WeightsError, match=files[0].name):
            await vllm_engine.load_weights(Weights(version=1, digest="x", files=files))
    assert vllm_engine.version == 0


async def test_weights_without_sound_numbers_are_refused_where_they_show(vllm_engine, new, publish):
    await vllm_engine.load_weights(publish(new | {EMBEDDING: new[EMBEDDING] * torch.nan}))
    with pytest.raises(EngineError, match="not finite"):
        await vllm_engine.generate(ask())


async def test_a_tied_head_that_equals_the_embedding_is_accepted(vllm_engine, new, publish):
    await vllm_engine.load_weights(publish(new | {"lm_head.weight": new[EMBEDDING].clone()}))
    assert vllm_engine.version == 1


async def test_a_cancelled_update_still_ends_as_one(vllm_engine, new, publish):
    updating = asyncio.create_task(vllm_engine.load_weights(publish(new)))
    await vllm_engine._llm.collective_rpc("spoke_path")  # the update is under way
    updating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await updating
    await vllm_engine.load_weights(publish(new, version=2))
    assert (await vllm_engine.generate(ask())).completions[0].versions == [(2, 24)]


async def test_check_answers_idle_busy_and_while_weights_change(vllm_engine, new, publish):
    await vllm_engine.check()
    busy = asyncio.create_task(vllm_engine.generate(ask(temperature=1.0, max_tokens=200)))
    update = asyncio.create_task(vllm_engine.load_weights(publish(new)))
    await asyncio.gather(*(vllm_engine.check() for _ in range(20)))
    await asyncio.gather(busy, update)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "/absent/checkpoint"}, "/absent/checkpoint"),
        ({"max_model_len": 513}, "513"),
        ({"dtype": "float12"}, "float12"),
        ({"device": "cuda"}, "cuda"),
    ],
    ids=str,
)
async def test_what_cannot_be_opened_says_why_in_one_line(tiny_math, settings, named):
    from server.engines import vllm

    with pytest.raises(ConfigError, match=named) as caught:
        await vllm.open_engine(EngineSettings(**({"model": str(tiny_math)} | settings)))
    assert "\n" not in str(caught.value)
