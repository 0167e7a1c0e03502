"""The `openai` client against a real server: it gets what `/rollout_tree` samples, from the weights of now.

1. Completions, chat, streams, logprobs, samples, stop strings, echo, errors, as the client knows them.
2. Tokens and logprobs are those of a greedy `/rollout_tree` group, and of a plain forward pass.
3. A load that overflows the engine's memory, seeded, echoing, streamed, beside trees, leaves every answer right.
4. After a push, and in the middle of one, no completion comes from the weights before.
5. A server that is told to stop ends the streams that run.
"""

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import running_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.wire import RolloutTreeResponse

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

QUESTION = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?"
PROMPT = f"{QUESTION}\n"
OPEN = "Tom has 30 coins."
"""Unlike anything that the model was trained on: samples differ."""
IDS = {"return_token_ids": True}


class Reference:
    """Plain transformers forward passes."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[L - 1, V] log-probabilities of what follows each token."""
        return self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)

    def of(self, prompt: list[int], response: list[int]) -> list[float]:
        """[T] log-probability of each token of a response."""
        rows = self.logprobs(prompt + response)[len(prompt) - 1 :]
        return [row[token].item() for row, token in zip(rows, response, strict=True)]

    def greedy(self, prompt: list[int], response: list[int]) -> bool:
        """Is each token of a response the likeliest?"""
        return self.logprobs(prompt + response)[len(prompt) - 1 :].argmax(-1).tolist() == response


@pytest.fixture(scope="module")
def old(chat_model: Path) -> Reference:
    return Reference(chat_model)


@pytest.fixture
async def client(openai_server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{openai_server.url}/v1", api_key="unused", timeout=120.0, max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def http(openai_server: Any) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=openai_server.url, timeout=120.0, limits=limits
    ) as client:
        yield client


async def group(http: httpx.AsyncClient, samples: int, **sampling: Any) -> RolloutTreeResponse:
    body = {"prompt": PROMPT, "plan": {"kind": "group", "samples": samples}, "sampling": sampling}
    answer = await http.post("/rollout_tree", json=body)
    assert answer.status_code == 200, answer.text
    return RolloutTreeResponse.model_validate_json(answer.content)


async def complete(client: openai.AsyncOpenAI, **changes: Any) -> Any:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 60, "temperature": 0.0, "logprobs": 0,
        "extra_body": IDS,
    }  # fmt: skip
    return await client.completions.create(**(asked | changes))


async def test_the_model_is_listed_by_its_name(client: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in await client.models.list()]
    assert model.id == "tiny"
    assert model.max_model_len == 512  # type: ignore[attr-defined]


async def test_a_greedy_completion_is_the_greedy_rollout(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, old: Reference
) -> None:
    leaf = (await group(http, 1, temperature=0.0, max_tokens=60)).nodes[1]
    completion = await complete(client)
    (choice,) = completion.choices
    assert choice.token_ids == leaf.token_ids
    assert choice.logprobs.token_logprobs == pytest.approx(leaf.logprobs, abs=1e-4)
    prompt = old.tokenizer(PROMPT)["input_ids"]
    assert old.greedy(prompt, choice.token_ids)
    assert choice.text == old.tokenizer.decode(choice.token_ids, skip_special_tokens=True)
    assert choice.finish_reason == "stop"
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == len(leaf.token_ids)
    assert completion.model == "tiny"


async def test_a_stream_is_the_same_completion_in_pieces(client: openai.AsyncOpenAI) -> None:
    whole = (await complete(client)).choices[0]
    usage = {"include_usage": True}
    chunks = [c async for c in await complete(client, stream=True, stream_options=usage)]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) > 10
    assert "".join(choice.text for choice in choices) == whole.text
    assert [t for choice in choices for t in choice.token_ids] == whole.token_ids
    logprobs = [lp for choice in choices for lp in choice.logprobs.token_logprobs]
    assert logprobs == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)
    assert choices[-1].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(whole.token_ids)


async def test_samples_differ_repeat_by_seed_and_carry_true_logprobs(
    client: openai.AsyncOpenAI, old: Reference
) -> None:
    one, two = [
        await complete(client, prompt=OPEN, n=4, seed=3, temperature=1.0, logprobs=2)
        for _ in range(2)
    ]
    tokens = [choice.token_ids for choice in one.choices]
    assert tokens == [choice.token_ids for choice in two.choices]
    assert len({tuple(t) for t in tokens}) == 4
    prompt = old.tokenizer(OPEN)["input_ids"]
    for choice in one.choices:
        expected = old.of(prompt, choice.token_ids)
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)


async def test_an_echo_scores_the_prompt(client: openai.AsyncOpenAI, old: Reference) -> None:
    prompts = [old.tokenizer(text)["input_ids"] for text in (PROMPT, OPEN)]
    scored = await complete(client, prompt=prompts, echo=True, max_tokens=1, logprobs=1)
    for prompt, choice in zip(prompts, scored.choices, strict=True):
        first, *rest = choice.logprobs.token_logprobs
        assert first is None
        expected = old.of(prompt[:1], prompt[1:] + choice.token_ids)
        assert rest == pytest.approx(expected, abs=1e-4)


async def test_a_stop_string_ends_a_completion(client: openai.AsyncOpenAI) -> None:
    whole = (await complete(client)).choices[0].text
    stopped = (await complete(client, stop=["####"])).choices[0]
    assert stopped.text == whole.partition("####")[0]
    assert stopped.finish_reason == "stop"


async def test_chat_is_the_completion_of_the_rendered_messages(
    client: openai.AsyncOpenAI,
) -> None:
    whole = (await complete(client)).choices[0]
    asked: dict[str, Any] = {
        "model": "tiny", "temperature": 0.0, "max_completion_tokens": 60, "logprobs": True,
        "messages": [{"role": "user", "content": QUESTION}],
    }  # fmt: skip
    chat = (await client.chat.completions.create(**asked)).choices[0]
    assert chat.message.role == "assistant"
    assert chat.message.content == whole.text
    logprobs = [token.logprob for token in chat.logprobs.content]
    assert logprobs == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)
    stream = await client.chat.completions.create(**asked, stream=True)
    pieces = [c.choices[0].delta.content async for c in stream if c.choices]
    assert len(pieces) > 10
    assert "".join(piece or "" for piece in pieces) == whole.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_errors_are_those_that_the_client_knows(
    client: openai.AsyncOpenAI, stream: bool
) -> None:
    with pytest.raises(openai.NotFoundError, match="`large` does not exist"):
        await complete(client, model="large", stream=stream)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        await complete(client, temperature=3.0, stream=stream)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await complete(client, prompt=[5] * 600, stream=stream)
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    messages: Any = [{"role": "user", "content": parts}]
    with pytest.raises(openai.BadRequestError, match="multimodal"):
        await client.chat.completions.create(model="tiny", messages=messages, stream=stream)


async def test_a_request_beyond_the_budget_is_too_large(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await complete(client, prompt=[PROMPT] * 2, n=60, max_tokens=500, temperature=1.0)
    assert caught.value.status_code == 413
    # 60,000 that may be sampled, and the prompts.
    assert re.search(r"60,0[0-9]{2} tokens are over", caught.value.body["detail"])  # type: ignore[index]


UNREACHED = [
    "/v1/chat/completions/batch", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/systemone",
    "/v1/completions/render", "/v1/load_lora_adapter", "/inference/v1/generate", "/tokenize", "/invocations",
    "/collective_rpc", "/pause", "/resume", "/sleep", "/reset_prefix_cache", "/update_weights",
    "/scale_elastic_ep", "/load", "/version", "/ping", "/server_info",
]  # fmt: skip
"""Of vLLM's own server, in development mode and out of it."""


@pytest.mark.parametrize("path", UNREACHED)
async def test_nothing_else_of_vllm_is_reached(http: httpx.AsyncClient, path: str) -> None:
    for verb in ("GET", "POST"):
        answer = await http.request(verb, path, json={})
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


async def flood(client: openai.AsyncOpenAI, seed: int) -> list[tuple[list[int], list[int], Any]]:
    """Requests of every kind at once; returns (prompt, token ids, logprobs) of those that can be checked."""
    long = [5 + (seed + i) % 300 for i in range(400)]
    hot: dict[str, Any] = {
        "temperature": 1.0,
        "seed": seed,
        "extra_body": IDS | {"ignore_eos": True},
    }
    asked = [
        complete(client, prompt=[long], max_tokens=100, **hot),
        complete(client, prompt=[long[:40], long[40:90]], n=3, max_tokens=200, **hot),
        complete(client, prompt=[long], echo=True, max_tokens=30, **hot),
        complete(
            client, prompt=[long[:60]], max_tokens=200, presence_penalty=1.0,
            temperature=1.0, seed=seed, extra_body=IDS | {"ignore_eos": True, "min_tokens": 5},
        ),
    ]  # fmt: skip
    stream = await complete(client, prompt=[long[:30]], max_tokens=200, stream=True, **hot)
    answers = asyncio.gather(*asked)
    pieces = [choice async for chunk in stream for choice in chunk.choices]
    streamed = [t for piece in pieces for t in piece.token_ids]
    found = [(long[:30], streamed, [x for p in pieces for x in p.logprobs.token_logprobs])]
    whole, several, echoed, penalised = await answers
    assert len(penalised.choices[0].token_ids) == 200
    for choice in [*whole.choices, *several.choices]:
        prompt = long if choice in whole.choices else long[:40] if choice.index < 3 else long[40:90]
        found.append((prompt, choice.token_ids, choice.logprobs.token_logprobs))
    _, *rest = echoed.choices[0].logprobs.token_logprobs
    found.append((long[:1], long[1:] + echoed.choices[0].token_ids, rest))
    return found


async def test_a_load_beyond_the_memory_leaves_every_answer_right(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, old: Reference, openai_server: Any
) -> None:
    seeds = [1000 * i for i in range(8)]
    trees = [group(http, 4, temperature=1.0, max_tokens=300, seed=seed) for seed in seeds]
    *floods, made = await asyncio.gather(
        *(flood(client, seed) for seed in seeds), asyncio.gather(*trees)
    )
    for prompt, response, logprobs in [found for answers in floods for found in answers]:
        assert logprobs == pytest.approx(old.of(prompt, response), abs=1e-3)
    for tree in made:
        for leaf in tree.leaves():
            expected = old.of(tree.prompt_token_ids, leaf.token_ids)
            assert leaf.logprobs == pytest.approx(expected, abs=1e-3)
    # A stream of a seed does not depend on what ran beside it, nor on having been pushed out.
    again = await group(http, 4, temperature=1.0, max_tokens=300, seed=seeds[0])
    assert [n.token_ids for n in again.nodes] == [n.token_ids for n in made[0].nodes]


def push(server: Any, model: Path) -> None:
    command = [
        sys.executable, "-m", "trainer.cli", "push", str(model), "--redis-url", server.redis_url,
        "--run", server.run, "--store", server.store, "--wait", "60",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


async def test_a_push_reaches_completions_at_once(
    client: openai.AsyncOpenAI, openai_server: Any, chat_model: Path, tmp_path: Path, old: Reference
) -> None:
    shutil.copytree(chat_model, tmp_path / "newer")
    torch.manual_seed(3)
    tensors = load_file(chat_model / "model.safetensors")
    noisy = {name: t + 0.03 * t.std() * torch.randn_like(t) for name, t in tensors.items()}
    (tmp_path / "newer/model.safetensors").unlink()  # the copy is as read-only as the original
    save_file(noisy, tmp_path / "newer/model.safetensors", metadata={"format": "pt"})
    new = Reference(tmp_path / "newer")
    prompt = old.tokenizer(PROMPT)["input_ids"] * 3  # some whole blocks, which the cache keeps

    async def check(reference: Reference, other: Reference) -> None:
        choice = (await complete(client, prompt=prompt)).choices[0]
        assert reference.greedy(prompt, choice.token_ids)
        expected = reference.of(prompt, choice.token_ids)
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert choice.logprobs.token_logprobs != pytest.approx(
            other.of(prompt, choice.token_ids), abs=1e-4
        )

    try:
        await check(old, new)
        pushing = asyncio.create_task(asyncio.to_thread(push, openai_server, tmp_path / "newer"))
        while not pushing.done():
            scored = (await complete(client, prompt=[prompt], echo=True, max_tokens=200)).choices[0]
            claimed = scored.logprobs.token_logprobs[1:]
            # Each number is the one or the other version's: none comes from both.
            ids = prompt + scored.token_ids
            versions = [
                [abs(claim - value) < 1e-3 for claim, value in zip(claimed, r.of(ids[:1], ids[1:]), strict=True)]
                for r in (old, new)
            ]  # fmt: skip
            assert all(any(pair) for pair in zip(*versions, strict=True))
        await pushing
        await check(new, old)
        await check(new, old)  # the second from the cache
    finally:
        await asyncio.to_thread(push, openai_server, chat_model)
    await check(old, new)


async def test_a_server_that_is_told_to_stop_ends_its_streams(
    tiny_math: Path, tmp_path: Path
) -> None:
    arguments = ["--engine", "vllm", "--dtype", "float32", "--kv-cache-gib", "0.1"]
    with running_server(tiny_math, tmp_path / "server.log", *arguments) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            stream = await client.completions.create(
                model=str(tiny_math), prompt="Ana", max_tokens=480, stream=True,
                extra_body=IDS | {"ignore_eos": True},
            )  # fmt: skip
            tokens: list[int] = []
            async for chunk in stream:
                if not tokens:
                    server.process.send_signal(signal.SIGTERM)
                tokens += chunk.choices[0].token_ids  # type: ignore[attr-defined]
        assert len(tokens) == 480
        assert await asyncio.to_thread(server.process.wait, 30) == 0
