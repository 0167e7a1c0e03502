"""The transformers engine's own parts: prefix store, rows and memory, other architectures, life and death."""

import asyncio
import doctest
import math
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    MistralConfig,
)

from server.engines import jobs, prefixes, stops
from server.engines.base import Completion, GenerateRequest, Weights
from server.engines.batch import Batch
from server.engines.prefixes import PrefixStore, Segment
from server.engines.settings import EngineSettings
from server.engines.transformers import TransformersEngine, open_engine
from shared.errors import ConfigError, EngineError, RequestError, WeightsError
from shared.tree import FinishReason

TIMEOUT = 60.0
PROMPT = (34, 79, 66, 309, 222, 18, 19, 15, 222, 40, 41, 42)
HOT = 20.0
"""A temperature at which rows have nothing in common."""


@pytest_asyncio.fixture
async def engine(tiny_math: Path) -> AsyncIterator[TransformersEngine]:
    opened = await open_engine(settings(tiny_math))
    yield opened
    await opened.close()


def settings(model: Path, **changes: Any) -> EngineSettings:
    plain = EngineSettings(model=str(model), dtype="float32", device="cpu", kv_cache_gib=1.0)
    return replace(plain, **changes)


def ask(prompt: tuple[int, ...] = PROMPT, **changes: Any) -> GenerateRequest:
    plain = GenerateRequest(
        prompt_token_ids=prompt, samples=1, max_tokens=16, temperature=0.0, seed=1
    )
    return replace(plain, **changes)


async def look(engine: TransformersEngine, action: Any) -> Any:
    """Run a function of the batch between two steps."""
    return await asyncio.wait_for(asyncio.wrap_future(engine._worker.call(action)), TIMEOUT)


async def never_end(engine: TransformersEngine) -> None:
    """Let responses run to their limit: no token ends one any more."""
    await look(engine, lambda b: b._ends.zero_())


async def until(engine: TransformersEngine, condition: Any) -> None:
    """Wait until the batch, seen between two steps, meets a condition."""

    async def poll() -> None:
        while not await look(engine, condition):
            pass

    await asyncio.wait_for(poll(), TIMEOUT)


@torch.inference_mode()
def errors(
    model: Any, prompt: tuple[int, ...], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """[T] logprob differences to a plain forward pass, nats."""
    tokens = completion.token_ids
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    exact = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return (exact - torch.tensor(completion.logprobs)).abs()


def error(model: Any, prompt: tuple[int, ...], completion: Completion) -> float:
    """Largest logprob difference to a plain forward pass at temperature 1, nats."""
    return float(errors(model, prompt, completion).max())


def plain_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


# --- the prefix store --------------------------------------------------------------------------------------


def states(path: list[int]) -> torch.Tensor:
    """[1, 2, 1, T, 1] keys and values that depend on the whole path, as real ones do."""
    values = [float(hash(tuple(path[: t + 1])) % 10**6) for t in range(len(path))]
    return torch.tensor(values)[None, None, None, :, None].expand(1, 2, 1, -1, 1)


def put(store: PrefixStore, path: list[int]) -> None:
    store.put(path, lambda start, stop: states(path)[..., start:stop, :].clone())


def found(store: PrefixStore, path: list[int]) -> int:
    """Tokens found, their states checked."""
    parts = [segment.states[..., :count, :] for segment, count in store.match(path)]
    if not parts:
        return 0
    joined = torch.cat(parts, dim=-2)
    assert torch.equal(joined, states(path)[..., : joined.shape[-2], :])
    return joined.shape[-2]


def test_docstring_examples():
    assert all(doctest.testmod(module).failed == 0 for module in (jobs, prefixes, stops))


def test_store_finds_the_longest_prefix_of_what_it_was_given():
    rng = random.Random(0)
    store = PrefixStore(10**9)
    kept: list[list[int]] = []
    for _ in range(300):
        base = rng.choice(kept)[: rng.randint(0, 12)] if kept else []
        path = base + [rng.randrange(3) for _ in range(rng.randint(1, 8))]
        expected = max((_common(path, other) for other in kept), default=0)
        assert found(store, path) == expected
        put(store, path)
        kept.append(path)
        assert found(store, path) == len(path)
    assert store.nbytes == _bytes(store._root)


def _common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _bytes(node: Segment) -> int:
    return node.nbytes + sum(_bytes(child) for child in node.children.values())


def test_store_keeps_each_segment_once():
    store = PrefixStore(10**9)
    trunk = [1, 2, 3, 4, 5, 6]
    for branch in ([7, 8], [7, 9], [8, 8]):
        put(store, trunk + branch)
    assert store.nbytes == 8 * (6 + 1 + 1 + 1 + 2)  # trunk, 7, 8 | 9, then 8 8


def test_store_drops_the_oldest_leaf_and_never_an_ancestor():
    store = PrefixStore(8 * 12)
    put(store, [1, 2, 3, 4])
    put(store, [1, 2, 3, 4, 5, 5])
    put(store, [1, 2, 3, 4, 6, 6])
    assert found(store, [1, 2, 3, 4, 5, 5]) == 6  # younger now than the other branch
    put(store, [9] * 6)
    assert found(store, [1, 2, 3, 4, 6, 6]) == 4
    assert found(store, [1, 2, 3, 4, 5, 5]) == 6
    assert store.nbytes <= 8 * 12
    put(store, [7] * 13)  # too large to keep: everything goes, nothing breaks
    assert store.nbytes == 0
    assert found(store, [1, 2]) == 0


def test_store_asks_only_for_what_is_missing():
    store = PrefixStore(10**9)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.zeros(1, 2, 1, stop - start, 1)

    for path in ([1, 2, 3], [1, 2, 3], [1, 2], [1, 2, 3, 4, 5], [1, 2, 9]):
        store.put(path, read)
    assert asked == [(0, 3), (3, 5), (2, 3)]


# --- trees -------------------------------------------------------------------------------------------------


async def test_a_tree_computes_no_prefix_twice(engine: TransformersEngine):
    first = await engine.generate(ask(samples=4, max_tokens=5, temperature=HOT))
    # Once the prompt but for its last token, and that one for each row.
    assert first.computed_prefill_tokens == len(PROMPT) - 1 + 4
    assert first.cached_tokens == 3 * (len(PROMPT) - 1)
    prompts = [(*PROMPT, *c.token_ids) for c in first.completions]
    children = await asyncio.gather(
        *(
            engine.generate(ask(p, samples=3, temperature=HOT, seed=100 * i))
            for i, p in enumerate(prompts)
        )
    )
    for child in children:
        assert child.computed_prefill_tokens == 3
        assert child.cached_tokens == 3 * (len(PROMPT) + 5 - 1)
    # A state in the middle of a segment, as chain plans ask for it.
    middle = await engine.generate(ask(prompts[0][:-2], max_tokens=1))
    assert middle.computed_prefill_tokens == 1


async def test_one_prompt_in_many_requests_at_once_is_computed_once(engine: TransformersEngine):
    results = await asyncio.gather(*(engine.generate(ask(seed=s)) for s in range(5)))
    assert sum(r.computed_prefill_tokens for r in results) == len(PROMPT) - 1 + 5


# --- rows and memory ---------------------------------------------------------------------------------------


async def test_a_small_batch_and_little_memory_change_nothing(
    engine: TransformersEngine, tiny_math: Path
):
    rng = random.Random(5)
    requests = [
        ask(
            tuple(rng.randrange(352) for _ in range(rng.randint(1, 200))),
            samples=rng.randint(1, 4),
            max_tokens=rng.choice([1, 7, 30, 120]),
            temperature=1.0,
            seed=100 * n,
        )
        for n in range(14)
    ]
    wide = await asyncio.gather(*(engine.generate(r) for r in requests))
    # 2 KiB a token: room for 1024 tokens of running rows, and as many stored.
    narrow = await open_engine(settings(tiny_math, max_batch=7, kv_cache_gib=4096 / 2**20))
    try:
        results = await asyncio.gather(*(narrow.generate(r) for r in requests))
        assert await look(narrow, lambda b: b._cache.rows * b._cache.capacity) <= 1024
        assert await look(narrow, lambda b: b._store.nbytes) <= 1024 * 2048
    finally:
        await narrow.close()
    for one, other in zip(wide, results, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]


async def test_the_context_shrinks_to_what_the_memory_holds(tiny_math: Path):
    small = await open_engine(settings(tiny_math, kv_cache_gib=800 / 2**20))
    await small.close()
    assert small.info.max_model_len == 200
    with pytest.raises(ConfigError, match="kv_cache_gib"):
        await open_engine(settings(tiny_math, kv_cache_gib=800 / 2**20, max_model_len=300))


async def test_cancelling_frees_rows_and_places_in_the_queue(engine: TransformersEngine):
    await never_end(engine)
    task = asyncio.create_task(engine.generate(ask(samples=300, max_tokens=400, temperature=HOT)))
    await until(engine, lambda b: b._rows.count == 256)
    assert await look(engine, lambda b: len(b._waiting)) == 44
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await look(engine, lambda b: (b._rows.count, b._rows.span, len(b._waiting), b.busy)) == (
        0,
        0,
        0,
        False,
    )


async def test_rows_that_remain_move_together(engine: TransformersEngine, tiny_math: Path):
    await never_end(engine)
    long = [
        asyncio.create_task(engine.generate(ask(max_tokens=200, temperature=HOT, seed=s)))
        for s in range(3)
    ]
    await until(engine, lambda b: b._rows.count == 3)
    short = [engine.generate(ask(max_tokens=3, temperature=HOT, seed=50 + s)) for s in range(60)]
    late = asyncio.gather(*short)
    last = asyncio.create_task(engine.generate(ask(max_tokens=200, temperature=HOT, seed=9)))
    await late
    await until(engine, lambda b: b._rows.count == 4 and b._rows.span == 4)
    model = plain_model(tiny_math)
    for result in [await task for task in (*long, last)]:
        (completion,) = result.completions
        assert len(completion.token_ids) == 200
        assert float(errors(model, PROMPT, completion, HOT).max()) < 1e-3


# --- stop strings ------------------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_row(engine: TransformersEngine, tiny_math: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_math)
    story = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
    prompt = tuple(tokenizer(story)["input_ids"])
    whole, stopped, other = await asyncio.gather(
        engine.generate(ask(prompt, max_tokens=60)),
        engine.generate(ask(prompt, max_tokens=60, stop=("nowhere", "+5"))),
        engine.generate(ask(prompt, max_tokens=60, stop=("apples?",))),  # in the prompt alone
    )
    text = tokenizer.decode(stopped.completions[0].token_ids)
    assert text.endswith("+5")
    assert tokenizer.decode(whole.completions[0].token_ids).startswith(text)
    assert stopped.completions[0].finish_reason is FinishReason.STOP
    assert other.completions[0].token_ids == whole.completions[0].token_ids


async def test_without_a_tokenizer_stop_strings_are_no_more_than_a_hint(
    tiny_math: Path, tmp_path: Path
):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_math / name).read_bytes())
    engine = await open_engine(settings(tmp_path))
    try:
        result = await engine.generate(ask(stop=("1",)))
    finally:
        await engine.close()
    assert result.completions


# --- requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
async def test_numbers_out_of_range_are_refused(
    engine: TransformersEngine, field: str, value: float
):
    with pytest.raises(RequestError) as refusal:
        await engine.generate(ask(**{field: value}))
    assert refusal.value.field == field


# --- weights -----------------------------------------------------------------------------------------------


async def test_broken_weights_fail_requests_and_sound_ones_mend_the_engine(
    engine: TransformersEngine, tiny_math: Path, tmp_path: Path
):
    tensors = load_file(tiny_math / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], math.nan)
    tensors["model.layers.0.self_attn.v_proj.weight"][:] = math.nan
    bad = tmp_path / "nan.safetensors"
    save_file(tensors, bad)
    await never_end(engine)
    long = ask(samples=8, max_tokens=300, temperature=HOT)
    running = asyncio.create_task(engine.generate(long))
    await until(engine, lambda b: b._rows.count == 8)
    await engine.load_weights(Weights(version=1, digest="nan", files=(bad,)))
    with pytest.raises(EngineError, match="sound weights"):
        await engine.generate(ask(max_tokens=3))
    with pytest.raises(EngineError, match="sound weights"):
        await engine.check()
    sound = Weights(version=2, digest="sound", files=(tiny_math / "model.safetensors",))
    await engine.load_weights(sound)
    with pytest.raises(EngineError, match="sound weights"):
        await running  # tokens of the broken version are among its own
    await engine.check()
    result = await engine.generate(ask(samples=4))
    assert max(error(plain_model(tiny_math), PROMPT, c) for c in result.completions) < 1e-3


async def test_tied_parameters_go_by_either_name(
    engine: TransformersEngine, tiny_math: Path, tmp_path: Path
):
    tensors = load_file(tiny_math / "model.safetensors")
    both = tmp_path / "both.safetensors"
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, both)
    with pytest.raises(
        WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        await engine.load_weights(Weights(version=1, digest="both", files=(both,)))
    head = tmp_path / "head.safetensors"
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, head)
    await engine.load_weights(Weights(version=1, digest="head", files=(head,)))
    assert engine.version == 1


async def test_shards_make_one_version(engine: TransformersEngine, tiny_math: Path, tmp_path: Path):
    items = list(load_file(tiny_math / "model.safetensors").items())
    paths = (tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    save_file(dict(items[:20]), paths[0])
    save_file(dict(items[20:]), paths[1])
    with pytest.raises(WeightsError, match="missing"):
        await engine.load_weights(Weights(version=4, digest="half", files=paths[:1]))
    await engine.load_weights(Weights(version=4, digest="whole", files=paths))
    assert engine.version == 4


# --- other architectures -----------------------------------------------------------------------------------


async def test_llama_runs(stories: Path):
    model = plain_model(stories)
    engine = await open_engine(settings(stories, dtype="auto"))
    try:
        results = await asyncio.gather(
            *(
                engine.generate(ask(PROMPT[:n], samples=3, max_tokens=100, temperature=1.0))
                for n in (3, 12)
            )
        )
    finally:
        await engine.close()
    for n, result in zip((3, 12), results, strict=True):
        assert max(error(model, PROMPT[:n], c) for c in result.completions) < 1e-3


def save_random(config: Any, path: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path)
    return model


async def test_absolute_positions_run(tmp_path: Path):
    """GPT-2: learned positions, a checkpoint without a tokenizer."""
    config = GPT2Config(
        vocab_size=90,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        eos_token_id=3,
        bos_token_id=3,
    )
    model = save_random(config, tmp_path)
    engine = await open_engine(settings(tmp_path))
    try:
        prompts = [(5, 6, 7, 8), (9, 10)]
        results = await asyncio.gather(
            *(engine.generate(ask(p, samples=3, max_tokens=80, temperature=1.0)) for p in prompts)
        )
    finally:
        await engine.close()
    for prompt, result in zip(prompts, results, strict=True):
        assert max(error(model, prompt, c) for c in result.completions) < 1e-3


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


async def test_a_sliding_window_runs_only_where_it_never_slides(tmp_path: Path):
    model = save_random(MistralConfig(**SMALL, sliding_window=16), tmp_path)
    with pytest.raises(EngineError, match="window of 16"):
        await open_engine(settings(tmp_path))
    engine = await open_engine(settings(tmp_path, max_model_len=16))
    try:
        result = await engine.generate(ask((4, 5, 6), samples=2, max_tokens=20, temperature=1.0))
    finally:
        await engine.close()
    assert max(error(model, (4, 5, 6), c) for c in result.completions) < 1e-3


async def test_attention_that_is_not_ours_is_refused(tmp_path: Path):
    save_random(Gemma2Config(**SMALL, sliding_window=64), tmp_path)
    with pytest.raises(EngineError, match="softcap"):
        await open_engine(settings(tmp_path))


async def test_a_state_space_model_is_refused(tmp_path: Path):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    save_random(config, tmp_path)
    with pytest.raises(EngineError, match="Mamba"):
        await open_engine(settings(tmp_path, max_model_len=64))


@pytest.mark.slow
async def test_bfloat16_agrees_with_a_plain_bfloat16_pass(tiny_math: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_math)
    story = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
    prompt = tuple(tokenizer(story)["input_ids"])
    requests = [
        ask(prompt, max_tokens=60),
        ask(PROMPT, samples=8, max_tokens=60, temperature=1.0),
    ]
    engine = await open_engine(settings(tiny_math, dtype="bfloat16"))
    try:
        sure, unsure = [await engine.generate(request) for request in requests]
    finally:
        await engine.close()
    assert engine.info.dtype == "bfloat16"
    model = plain_model(tiny_math, torch.bfloat16)
    assert error(model, prompt, sure.completions[0]) < 5e-2
    # Where the model is unsure, transformers' own two attention kernels differ by up to 0.2 in bfloat16.
    off = torch.cat([errors(model, PROMPT, c) for c in unsure.completions])
    assert float(off.mean()) < 5e-2


# --- life and death ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "./no-such-folder"}, "no such folder"),
        ({"dtype": "float16"}, "dtype"),
        ({"max_model_len": 513}, "at most 512"),
        ({"max_model_len": 1}, "2 tokens"),
        ({"kv_cache_gib": 1e-9}, "kv_cache_gib"),
    ],
)
async def test_settings_that_cannot_be_had(tiny_math: Path, changes: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        await open_engine(replace(settings(tiny_math), **changes))


async def test_a_damaged_checkpoint_is_named_in_one_line(tiny_math: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((tiny_math / "config.json").read_bytes())
    weights = (tiny_math / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError) as refusal:
        await open_engine(settings(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


async def test_closing_fails_what_is_open_and_may_be_repeated(tiny_math: Path):
    engine = await open_engine(settings(tiny_math))
    await never_end(engine)
    task = asyncio.create_task(engine.generate(ask(samples=300, max_tokens=400, temperature=HOT)))
    await until(engine, lambda b: b._rows.count == 256)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await task
    for call in (engine.check(), engine.generate(ask())):
        with pytest.raises(EngineError, match="closed"):
            await call
    with pytest.raises(EngineError, match="closed"):
        await engine.load_weights(Weights(version=1, digest="", files=()))
    await engine.close()
    assert not engine._worker._thread.is_alive()


async def test_a_thread_that_dies_fails_everything(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    await never_end(engine)
    task = asyncio.create_task(engine.generate(ask(samples=4, max_tokens=400, temperature=HOT)))
    await until(engine, lambda b: b._rows.count == 4)

    def broken(self: Batch) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Batch, "step", broken)
    with pytest.raises(EngineError, match="no more"):
        await asyncio.wait_for(task, TIMEOUT)
    for call in (engine.check(), engine.generate(ask())):
        with pytest.raises(EngineError, match="no more"):
            await asyncio.wait_for(call, TIMEOUT)
