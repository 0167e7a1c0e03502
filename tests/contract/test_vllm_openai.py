"""vLLM's OpenAI routes on an engine that also samples trees: what is served, what is refused, what is left behind.

1. Three routes (and a fourth that no server forwards) and nothing else of vLLM's server.
2. What could harm the engine, or would fail in it, is a 400 in OpenAI's form that names the parameter; the engine
   answers afterwards.
3. A caller that goes away leaves nothing in the engine. Open requests count as the engine's own.
"""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.engines.base import GenerateRequest, SpeaksOpenAI

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

PLAIN: dict[str, Any] = {"model": "tiny", "prompt": "Ben has 9 apples", "max_tokens": 8}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def app(vllm_session):
    assert isinstance(vllm_session, SpeaksOpenAI)
    return await vllm_session.openai_app("tiny")


@pytest_asyncio.fixture(loop_scope="session")
async def client(app, vllm_engine):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client


async def test_the_application_has_the_three_routes_alone(app):
    assert [route.path for route in app.routes] == [
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
    ]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": [5, 352]}),  # the tokenizer knows this token, the model does not
    ("prompt", {"prompt": [5, 2**70]}),
    ("prompt", {"prompt": ""}),
    ("prompt_embeds", {"prompt": None, "prompt_embeds": "AAAA"}),
    ("input_tokens", {"prompt": [5] * 513}),
    ("max_tokens", {"prompt": [5] * 512}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 2**70}),
    ("min_tokens", {"min_tokens": 9}),
    ("n", {"n": 129}),
    ("n", {"n": 0}),
    ("n", {"n": 2, "temperature": 0}),
    ("temperature", {"temperature": 2.5}),
    ("temperature", {"temperature": float("nan")}),
    ("top_p", {"top_p": 0}),
    ("top_k", {"top_k": 2**70}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": float("nan")}),
    ("seed", {"seed": 2**63 - 1, "n": 2}),
    ("seed", {"seed": 2**63}),
    ("repetition_penalty", {"repetition_penalty": 1e-300}),
    ("presence_penalty", {"presence_penalty": float("inf")}),
    ("logit_bias", {"logit_bias": {"352": 1}}),
    ("stop_token_ids", {"stop_token_ids": [352], "min_tokens": 2}),
    ("allowed_token_ids", {"allowed_token_ids": [-1]}),
    ("logprob_token_ids", {"logprob_token_ids": [352], "logprobs": 1}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
    ("stop", {"stop": [str(i) for i in range(17)]}),
    ("stop", {"stop": [""]}),
    ("use_beam_search", {"use_beam_search": True, "n": 4}),
    ("use_beam_search", {"use_beam_search": "yes"}),
    ("best_of", {"best_of": 4}),
    ("length_penalty", {"length_penalty": 2.0}),
    ("stream_interval", {"stream": True, "stream_interval": 2**70}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("response_format", {"structured_outputs": {"regex": "(a+)+b"}}),
    ("vllm_xargs", {"vllm_xargs": {"a": 1}}),
    ("vllm_xargs", {"kv_transfer_params": {"do_remote_prefill": True}}),
    ("priority", {"priority": -5}),
    ("routed_experts_prompt_start", {"routed_experts_prompt_start": 1}),
    ("thinking_token_budget", {"thinking_token_budget": 3}),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("parameter", "changes"), REFUSED, ids=lambda value: str(value)[:50])
async def test_what_would_fail_is_refused_by_name(client, vllm_engine, parameter, changes, stream):
    # The standard library writes NaN and infinities, as some clients do.
    content = json.dumps(PLAIN | changes | {"stream": stream})
    answer = await client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert parameter.replace("_", " ") in f"{error['param']} {error['message']}".replace("_", " ")
    await vllm_engine.check()


SERVED: list[dict[str, Any]] = [
    {"seed": -(2**63), "n": 3},
    {"seed": 2**63 - 3, "n": 3},
    {"n": 128, "max_tokens": 1},
    {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 0.01, "n": 2},
    {"repetition_penalty": 100, "logprobs": 20, "temperature": 1e-300},
    {"logit_bias": {"5": float("nan"), "6": float("inf")}, "logprobs": 1},
    {"top_k": 2**31 - 1, "min_p": 1.0, "top_p": 1e-9},
    {"stop_token_ids": [0, 351], "min_tokens": 8, "ignore_eos": True},
    {"allowed_token_ids": [0], "bad_words": ["a", " the"], "seed": 1},
    {"prompt": [[5] * 511, [0], [351]], "seed": 2, "n": 2, "max_tokens": 1, "logprobs": 0},
    {"prompt": [5] * 511, "echo": True, "logprobs": 20, "max_tokens": 0},
    {"echo": True, "logprobs": 5, "seed": 4, "n": 2, "stop": ["a", "####"]},
    {"prompt_logprobs": 20, "seed": 1},
    {"use_beam_search": False, "best_of": 1, "length_penalty": 1, "n": 4},
    {"stop": [f"word {i}" for i in range(16)]},
    {"truncate_prompt_tokens": 2, "cache_salt": "initial", "user": "someone"},
]


@pytest.mark.parametrize("changes", SERVED, ids=lambda value: str(value)[:50])
async def test_the_limits_themselves_are_served(client, vllm_engine, changes):
    content = json.dumps(PLAIN | changes)
    answer = await client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    prompts = len(changes["prompt"]) if isinstance(changes.get("prompt", [0])[0], list) else 1
    assert len(answer.json()["choices"]) == prompts * changes.get("n", 1)
    await vllm_engine.check()


async def test_a_model_without_a_template_has_no_chat_and_says_so(client):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 2,
    }
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "chat template" in answer.json()["error"]["message"]


async def test_a_request_brings_no_template_of_its_own(client):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 2,
    }
    answer = await client.post("/v1/chat/completions", json=body | {"chat_template": "{{ 1 }}"})
    assert answer.status_code == 400
    assert "trust" in answer.json()["error"]["message"]


async def test_the_routes_reach_nothing_else_of_the_engine(app):
    guarded = app.state.engine_client
    assert guarded.model_config.max_model_len == 512
    for name in ("collective_rpc", "pause_generation", "sleep", "shutdown", "add_lora", "abort"):
        with pytest.raises(AttributeError, match=name):
            getattr(guarded, name)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_caller_that_goes_away_leaves_nothing(app, vllm_engine, stream):
    body = PLAIN | {"n": 4, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    gone = asyncio.Event()
    request = httpx.Request("POST", "http://engine/v1/completions", json=body)
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "query_string": b"",
        "path": "/v1/completions", "root_path": "", "headers": [(b"content-type", b"application/json")],
        "server": ("engine", 80), "client": ("test", 1),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": request.content, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    asking = asyncio.create_task(app(scope, receive, send))
    await until(lambda: vllm_engine._llm.get_num_unfinished_requests() == 4)
    # A probe that took its turn behind these would wait for them; the engine knows that it is busy.
    assert vllm_engine._running == 1
    await vllm_engine.check()
    gone.set()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(asking, 5)
    await until(lambda: vllm_engine._llm.get_num_unfinished_requests() == 0)
    await until(lambda: vllm_engine._running == 0)
    await vllm_engine.check()


async def until(holds, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def test_it_samples_what_the_engine_samples(client, vllm_engine):
    prompt = tuple(range(5, 70))
    request = GenerateRequest(
        prompt_token_ids=prompt, samples=3, max_tokens=24, temperature=0.7, seed=11
    )
    own = await vllm_engine.generate(request)
    body = {
        "model": "tiny", "prompt": list(prompt), "n": 3, "max_tokens": 24, "temperature": 0.7, "seed": 11,
        "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False,
    }  # fmt: skip
    choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    for choice, completion in zip(choices, own.completions, strict=True):
        assert choice["token_ids"] == completion.token_ids
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(completion.logprobs, abs=1e-4)
