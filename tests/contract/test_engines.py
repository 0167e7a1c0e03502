"""What every engine promises (`server.engines.base.Engine`), held on each of them against a plain forward pass."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.engines.base import Completion, Engine, GenerateRequest, GenerateResult, News, Weights
from shared.errors import RequestError, WeightsError
from shared.tree import FinishReason
from tests.contract.plain import END, TIMEOUT, ask, error, greedy, logits, plain, run

pytestmark = pytest.mark.asyncio(loop_scope="session")

STORY = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
TOLERANCE = 1e-3
"""Most a float32 logprob may be off, nats."""


@pytest.fixture(scope="module")
def reference(tiny_math: Path) -> Any:
    """The checkpoint under plain transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_math, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt(tiny_math: Path) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(tiny_math)(STORY)["input_ids"])


@pytest.fixture(scope="module")
def perturbed(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Any]:
    """Version 7: every tensor of the checkpoint moved, as a file and as a plain model."""
    noise = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise)
        for name, tensor in load_file(tiny_math / "model.safetensors").items()
    }
    path = tmp_path_factory.mktemp("perturbed") / "model.safetensors"
    save_file(tensors, path)
    model = AutoModelForCausalLM.from_pretrained(tiny_math, dtype=torch.float32).eval()
    model.load_state_dict(tensors, strict=False)
    return Weights(version=7, digest="perturbed", files=(path,)), model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_whole(request: GenerateRequest, result: GenerateResult, context: int) -> None:
    """Lengths, finish reasons and counts fit together."""
    assert len(result.completions) == request.samples
    prompt_tokens = len(request.prompt_token_ids)
    limit = min(request.max_tokens, context - prompt_tokens)
    for completion in result.completions:
        tokens = completion.token_ids
        assert 1 <= len(tokens) <= limit
        assert len(completion.logprobs) == len(tokens)
        assert sum(count for _, count in completion.versions) == len(tokens)
        assert END not in tokens[:-1]
        stopped = tokens[-1] == END
        assert completion.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert stopped or len(tokens) == limit
    # An engine may sample equal greedy continuations once.
    seen = result.cached_tokens + result.computed_prefill_tokens
    assert result.computed_prefill_tokens >= 1
    assert prompt_tokens <= seen <= request.samples * prompt_tokens


# --- what is sampled ---------------------------------------------------------------------------------------


async def test_says_what_it_is(engine: Engine):
    info = engine.info
    assert info.dtype == "float32"
    assert (info.vocab_size, info.max_model_len, info.eos_token_ids) == (352, 512, (END,))
    await engine.check()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
async def test_logprobs_are_those_of_a_plain_forward_pass(
    engine: Engine, reference: Any, prompt: tuple[int, ...], temperature: float
):
    request = ask(prompt, samples=6, max_tokens=80, temperature=temperature)
    result = await run(engine, request)
    assert_whole(request, result, 512)
    assert max(error(reference, request, c) for c in result.completions) < TOLERANCE


async def test_greedy_tokens_are_those_of_a_plain_forward_pass(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    for cut in (len(prompt), 9, 1):
        result = await run(engine, ask(prompt[:cut], max_tokens=40))
        assert result.completions[0].token_ids == greedy(reference, prompt[:cut], 40)


async def test_top_k_keeps_k_tokens_and_renormalises(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    request = ask(prompt, samples=8, max_tokens=40, temperature=1.5, top_k=3)
    for completion in (await run(engine, request)).completions:
        scores = logits(reference, prompt, completion.token_ids) / 1.5
        best = scores.topk(3)
        tokens = torch.tensor(completion.token_ids)[:, None]
        assert (best.indices == tokens).any(-1).all()
        expected = scores.gather(-1, tokens)[:, 0] - best.values.logsumexp(-1)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=TOLERANCE, rtol=0
        )


async def test_top_p_keeps_the_nucleus_and_renormalises(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    request = ask(prompt, samples=8, max_tokens=40, temperature=1.5, top_p=0.7)
    for completion in (await run(engine, request)).completions:
        scores = logits(reference, prompt, completion.token_ids) / 1.5
        for row, token, logprob in zip(
            scores.softmax(-1), completion.token_ids, completion.logprobs, strict=True
        ):
            ordered, order = row.sort(descending=True)
            kept = int((ordered.cumsum(0) < 0.7 - 1e-5).sum()) + 1
            assert token in order[:kept]
            expected = float((row[token] / ordered[:kept].sum()).log())
            assert logprob == pytest.approx(expected, abs=TOLERANCE)


# --- where it ends -----------------------------------------------------------------------------------------


async def test_the_end_token_is_returned_and_scored(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    request = ask(prompt, max_tokens=100)
    (completion,) = (await run(engine, request)).completions
    assert completion.finish_reason is FinishReason.STOP
    assert completion.token_ids[-1] == END
    assert error(reference, request, completion) < TOLERANCE


async def test_max_tokens_ends_with_length(engine: Engine, prompt: tuple[int, ...]):
    (completion,) = (await run(engine, ask(prompt, max_tokens=5))).completions
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.token_ids) == 5


async def test_the_end_token_in_the_last_place_is_a_stop(engine: Engine, prompt: tuple[int, ...]):
    whole = (await run(engine, ask(prompt, max_tokens=100))).completions[0]
    (cut,) = (await run(engine, ask(prompt, max_tokens=len(whole.token_ids)))).completions
    assert cut.token_ids == whole.token_ids
    assert cut.finish_reason is FinishReason.STOP


async def test_the_context_ends_with_length(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    long = (prompt * 20)[:505]
    request = ask(long, samples=3, max_tokens=400, temperature=2.0)
    result = await run(engine, request)
    assert_whole(request, result, 512)
    assert FinishReason.LENGTH in {c.finish_reason for c in result.completions}
    assert max(error(reference, request, c) for c in result.completions) < TOLERANCE


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt_token_ids", {"prompt_token_ids": ()}),
        ("prompt_token_ids", {"prompt_token_ids": (5, 352)}),
        ("prompt_token_ids", {"prompt_token_ids": (5, -1)}),
        ("prompt_token_ids", {"prompt_token_ids": (5,) * 512}),
        ("samples", {"samples": 0}),
    ],
)
async def test_what_does_not_fit_is_refused(engine: Engine, field: str, changes: dict[str, Any]):
    with pytest.raises(RequestError) as refusal:
        await run(engine, ask((5, 6), **changes))
    assert refusal.value.field == field
    await engine.check()


# --- seeds -------------------------------------------------------------------------------------------------


async def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(
    engine: Engine, prompt: tuple[int, ...]
):
    request = ask(prompt, samples=4, max_tokens=60, temperature=1.0, seed=40)
    alone = await run(engine, request)
    others = [
        ask(prompt[:n], samples=3, max_tokens=50, temperature=1.0, seed=n * 100)
        for n in range(1, 13)
    ]
    beside = (await asyncio.gather(*(run(engine, r) for r in (*others, request))))[-1]
    assert [c.token_ids for c in beside.completions] == [c.token_ids for c in alone.completions]
    for one, other in zip(alone.completions, beside.completions, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


async def test_sample_i_draws_from_stream_seed_plus_i(engine: Engine, prompt: tuple[int, ...]):
    together = await run(engine, ask(prompt, samples=4, max_tokens=40, temperature=1.0, seed=900))
    for index, completion in enumerate(together.completions):
        single = await run(engine, ask(prompt, max_tokens=40, temperature=1.0, seed=900 + index))
        assert single.completions[0].token_ids == completion.token_ids


async def test_siblings_differ(engine: Engine, prompt: tuple[int, ...]):
    result = await run(engine, ask(prompt[:9], samples=16, max_tokens=40, temperature=2.0))
    assert len({tuple(c.token_ids) for c in result.completions}) == 16


# --- prefixes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_news_tell_of_tokens_while_they_are_sampled(
    engine: Engine, prompt: tuple[int, ...], temperature: float
):
    told: list[News] = []
    request = ask(prompt, samples=3, max_tokens=60, temperature=temperature)
    result = await run(engine, replace(request, on_news=told.extend))
    ends_at = len(told)
    for sample, completion in enumerate(result.completions):
        mine = [news for news in told if news.sample == sample]
        tokens = [token for news in mine for token in news.token_ids]
        logprobs = [logprob for news in mine for logprob in news.logprobs]
        assert tokens == completion.token_ids[: len(tokens)]
        assert logprobs == completion.logprobs[: len(tokens)]
        # A copy of a greedy sample may be left out.
        assert len(tokens) >= len(completion.token_ids) - 8 or (sample and temperature == 0.0)
        assert len(mine) >= len(tokens) // 8 - 1
    # Nobody is told afterwards, and to be told changes nothing.
    again = await run(engine, request)
    for mine, told_of in zip(again.completions, result.completions, strict=True):
        assert mine.token_ids == told_of.token_ids
        # The second time the prompt comes from the cache: another kernel on some processors, the last bits differ.
        assert mine.logprobs == pytest.approx(told_of.logprobs, abs=1e-5)
    assert len(told) == ends_at > 3


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_completions_are_told_as_they_end(
    engine: Engine, prompt: tuple[int, ...], temperature: float
):
    told: dict[int, Completion] = {}
    lengths: list[int] = []

    def ended(sample: int, completion: Completion) -> None:
        assert sample not in told
        told[sample] = completion
        lengths.append(len(completion.token_ids))

    request = ask(prompt, samples=6, max_tokens=60, temperature=temperature, seed=5)
    result = await run(engine, replace(request, on_completion=ended))
    assert [told[sample] for sample in range(6)] == result.completions
    assert lengths == sorted(lengths)  # the shortest is not kept waiting by its siblings
    assert temperature == 0.0 or len(set(lengths)) > 1


async def test_priority_comes_before_arrival(engine: Engine, prompt: tuple[int, ...]):
    order: list[str] = []

    async def one(name: str, priority: int, samples: int) -> None:
        await run(engine, ask(prompt, samples=samples, max_tokens=20, seed=3, temperature=1.0,
                              priority=priority))  # fmt: skip
        order.append(name)

    # The first fills every place, so that the others wait; the last to come is the most urgent.
    jobs = [one("fills", 0, engine.info.max_batch), one("late", 1, 300), one("urgent", -1, 4)]
    await asyncio.gather(*jobs)
    assert order.index("urgent") < order.index("late")


async def test_an_engine_says_what_it_holds(engine: Engine):
    info = engine.info
    assert info.max_batch == 256
    assert info.block_tokens == (32 if info.engine == "vllm" else 1)
    # A quarter GiB; tiny_math keeps 2 layers x 2 x 64 x 2 heads or less of float32 a token.
    assert 10_000 < info.kv_tokens < 4_000_000


async def test_a_request_may_start_from_what_another_tells_of(
    engine: Engine, prompt: tuple[int, ...]
):
    path = list(prompt)
    children: dict[int, asyncio.Task[GenerateResult]] = {}

    def start(told: Sequence[News]) -> None:
        for news in told:
            path.extend(news.token_ids)
        # Were the last token the end, a request would go on behind it.
        if path[-1] != END:
            children[len(path) - len(prompt)] = asyncio.create_task(run(engine, ask(path)))

    (whole,) = (await run(engine, replace(ask(prompt, max_tokens=40), on_news=start))).completions
    assert len(children) > 1
    for length, child in children.items():
        (completion,) = (await child).completions
        expected = whole.token_ids[length : length + 16]
        assert completion.token_ids[: len(expected)] == expected


async def test_a_child_goes_on_where_its_parent_stopped(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    whole = (await run(engine, ask(prompt, max_tokens=20))).completions[0]
    parent = (await run(engine, ask(prompt, max_tokens=9))).completions[0]
    request = ask((*prompt, *parent.token_ids), samples=3, max_tokens=11)
    result = await run(engine, request)
    for child in result.completions:
        assert parent.token_ids + child.token_ids == whole.token_ids
        assert error(reference, request, child) < TOLERANCE
    assert result.cached_tokens > 0


# --- cancellation ------------------------------------------------------------------------------------------


async def test_an_engine_counts_its_open_sequences(engine: Engine, prompt: tuple[int, ...]):
    async def until(holds: Callable[[int], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds(engine.open_sequences):
                await asyncio.sleep(0.005)

    await until(lambda count: count == 0)
    waiting = engine.info.max_batch + 40  # more than run at once
    request = ask(prompt, samples=waiting, max_tokens=300, temperature=1.9, seed=1)
    doomed = asyncio.create_task(engine.generate(request))
    await until(lambda count: count >= waiting // 2)
    doomed.cancel()
    await asyncio.gather(doomed, return_exceptions=True)
    await until(lambda count: count == 0)
    await run(engine, ask(prompt, samples=3, temperature=1.0))
    await until(lambda count: count == 0)


async def test_a_cancelled_request_frees_its_place_and_disturbs_nobody(
    engine: Engine, prompt: tuple[int, ...]
):
    neighbour = ask(prompt, samples=4, max_tokens=16, temperature=1.0, seed=77)
    alone = await run(engine, neighbour)
    # Most of it would run for long, and some of it has no place in the batch yet.
    long = ask(prompt[:3], samples=400, max_tokens=400, temperature=1.5, seed=10_000)
    first = asyncio.create_task(engine.generate(replace(neighbour, seed=78)))
    doomed = asyncio.create_task(engine.generate(long))
    await asyncio.wait_for(first, TIMEOUT)  # by now the long one has begun
    quick = asyncio.create_task(run(engine, neighbour))
    assert not doomed.done()
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    beside = await quick
    assert [c.token_ids for c in beside.completions] == [c.token_ids for c in alone.completions]
    await engine.check()


# --- weights -----------------------------------------------------------------------------------------------


def by_version(completion: Completion) -> Iterator[tuple[int, slice]]:
    """(version, its tokens) of each span."""
    start = 0
    for version, count in completion.versions:
        yield version, slice(start, start + count)
        start += count


async def test_an_update_in_mid_request_mixes_nothing(
    engine: Engine, reference: Any, prompt: tuple[int, ...], perturbed: tuple[Weights, Any]
):
    weights, changed = perturbed
    models = {0: reference, 7: changed}
    start = prompt[:3]  # which most responses follow for long
    request = ask(start, samples=2, max_tokens=120, temperature=1.5)
    before = await run(engine, ask(prompt, samples=4, max_tokens=40, temperature=1.0))
    # Some in mid-flight, some with a prefix that the old weights computed, some still without a token.
    running = [asyncio.create_task(run(engine, replace(request, seed=s))) for s in range(0, 80, 10)]
    await run(engine, ask(prompt, max_tokens=8))
    update = asyncio.create_task(engine.load_weights(weights))
    running += [
        asyncio.create_task(run(engine, replace(request, seed=s))) for s in range(80, 120, 10)
    ]
    report = await asyncio.wait_for(update, TIMEOUT)
    assert engine.version == 7
    assert report.pause_s >= report.apply_s > 0
    after = await run(engine, ask(prompt, samples=4, max_tokens=40, temperature=1.0))
    completions = [c for result in await asyncio.gather(*running) for c in result.completions]
    assert any(len(c.versions) == 2 for c in completions), "the update came between two tokens"
    for completion in completions:
        assert sum(count for _, count in completion.versions) == len(completion.token_ids)
        assert [v for v, _ in completion.versions] in ([0], [0, 7], [7])
        ours = torch.tensor(completion.logprobs)
        for version, part in by_version(completion):
            exact = plain(models[version], start, completion.token_ids, 1.5)[part]
            wrong = plain(models[7 - version], start, completion.token_ids, 1.5)[part]
            assert float((ours[part] - exact).abs().max()) < TOLERANCE
            if len(exact) >= 8:
                assert float((ours[part] - wrong).abs().max()) > 0.05, "the test could not fail"
    for result, version in ((before, 0), (after, 7)):
        for completion in result.completions:
            assert completion.versions == [(version, len(completion.token_ids))]
            sound = ask(prompt, temperature=1.0)
            assert error(models[version], sound, completion) < TOLERANCE


async def test_after_an_update_nothing_of_the_old_weights_is_left(
    engine: Engine, prompt: tuple[int, ...], perturbed: tuple[Weights, Any]
):
    weights, changed = perturbed
    await run(engine, ask(prompt, max_tokens=30))
    await engine.load_weights(weights)
    result = await run(engine, ask(prompt, max_tokens=30))
    assert result.completions[0].token_ids == greedy(changed, prompt, 30)
    assert error(changed, ask(prompt), result.completions[0]) < TOLERANCE


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.mlp.up_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(64)


@pytest.mark.parametrize("damage", [_drop, _add, _reshape])
async def test_weights_that_do_not_fit_change_nothing(
    engine: Engine,
    reference: Any,
    prompt: tuple[int, ...],
    perturbed: tuple[Weights, Any],
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
):
    tensors = load_file(perturbed[0].files[0])
    damage(tensors)
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    with pytest.raises(WeightsError):
        await engine.load_weights(Weights(version=8, digest="bad", files=(bad,)))
    assert engine.version == 0
    result = await run(engine, ask(prompt, max_tokens=30))
    assert result.completions[0].token_ids == greedy(reference, prompt, 30)
    assert error(reference, ask(prompt), result.completions[0]) < TOLERANCE


async def test_a_damaged_file_changes_nothing(
    engine: Engine, reference: Any, prompt: tuple[int, ...], tmp_path: Path, tiny_math: Path
):
    bad = tmp_path / "cut.safetensors"
    bad.write_bytes((tiny_math / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(WeightsError):
        await engine.load_weights(Weights(version=8, digest="cut", files=(bad,)))
    assert engine.version == 0
    result = await run(engine, ask(prompt, max_tokens=30))
    assert result.completions[0].token_ids == greedy(reference, prompt, 30)


# --- load --------------------------------------------------------------------------------------------------


async def test_forty_mixed_requests_at_once_are_all_right(
    engine: Engine, reference: Any, prompt: tuple[int, ...]
):
    rng = random.Random(3)
    requests = [
        ask(
            (prompt * 4)[rng.randrange(9) : rng.randrange(10, 120)],
            samples=rng.randint(1, 5),
            max_tokens=rng.randint(1, 60),
            temperature=rng.choice([0.0, 0.6, 1.0, 1.3]),
            seed=1000 * n,
        )
        for n in range(40)
    ]
    results = await asyncio.gather(*(run(engine, request) for request in requests))
    for request, result in zip(requests, results, strict=True):
        assert_whole(request, result, 512)
        assert max(error(reference, request, c) for c in result.completions) < TOLERANCE
