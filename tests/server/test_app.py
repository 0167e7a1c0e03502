"""`POST /rollout_tree` over real HTTP: structure, values, limits, and every bad input by name.

1. Nodes come parents first, depth first; children keep to the plan; ids are positions.
2. Tokens and logprobs pair up; a leaf that ended carries the end token; `length` at a leaf means the limit.
3. Values are the means of the children's; rewards are of the whole response.
4. A request with a seed is reproducible; siblings differ.
5. The same id and body gives the same tree; another body is 409.
6. Bad input is a problem document that names the field.
"""

import asyncio
from itertools import pairwise
from typing import Any

import httpx
import pytest

from shared.wire import RolloutTreeResponse

PROMPT = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
TREE = {"kind": "tree", "branch_factors": [3, 2, 2], "segment_tokens": 8}


@pytest.fixture
async def client(server_url: str):
    async with httpx.AsyncClient(base_url=server_url, timeout=60.0) as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "prompt": PROMPT,
        "plan": TREE,
        "sampling": {"temperature": 1.0, "max_tokens": 40, "seed": 5},
        "reward": {"name": "gsm8k", "reference": "17"},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


async def tree(client: httpx.AsyncClient, **changes: Any) -> RolloutTreeResponse:
    answer = await client.post("/rollout_tree", json=body(**changes))
    assert answer.status_code == 200, answer.text
    return RolloutTreeResponse.model_validate(answer.json())


async def test_a_tree_keeps_to_its_plan(client: httpx.AsyncClient) -> None:
    made = await tree(client)
    assert [n.depth for n in made.nodes][0:2] == [0, 1]
    assert all(b.depth <= a.depth + 1 for a, b in pairwise(made.nodes))
    for node in made.nodes:
        children = made.children[node.id]
        tokens = made.response_token_ids(node.id)
        assert len(tokens) <= 40
        if node.depth < 3 and node.finish_reason in (None, "length"):
            assert len(children) == TREE["branch_factors"][node.depth]
            assert node.depth == 0 or len(node.token_ids) == 8
        else:
            assert not children
        if not children and node.finish_reason == "length":
            assert len(tokens) == 40
            assert node.reward == 0.0


async def test_tokens_logprobs_and_versions_pair_up(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    made = await tree(client)
    assert made.nodes[0].logprobs is None
    for node in made.nodes[1:]:
        assert len(node.logprobs) == len(node.token_ids) > 0
        assert max(node.logprobs) <= 0.0
        assert node.versions == [(0, len(node.token_ids))]
        ended = node.token_ids[-1] in info["eos_token_ids"]
        assert ended == (node.finish_reason == "stop")
    assert made.usage.sampled_tokens == sum(len(n.token_ids) for n in made.nodes[1:])
    assert made.usage.prompt_tokens == len(made.nodes[0].token_ids)


async def test_values_are_means_and_rewards_are_of_whole_responses(
    client: httpx.AsyncClient,
) -> None:
    made = await tree(client, sampling={"max_tokens": 40, "seed": 1})
    for node in made.nodes:
        below = [made.nodes[child].value for child in made.children[node.id]]
        if below:
            assert node.value == pytest.approx(sum(below) / len(below), abs=1e-12)
            assert node.reward is None
        else:
            assert node.value == node.reward
    for leaf in made.leaves():
        text = "".join(node.text for node in made.path(leaf.id))
        if leaf.finish_reason == "stop":
            assert leaf.reward == float(text.rstrip().endswith("#### 17"))


async def test_a_greedy_group_is_right_about_apples(client: httpx.AsyncClient) -> None:
    made = await tree(
        client,
        plan={"kind": "group", "samples": 2},
        sampling={"temperature": 0.0, "max_tokens": 100},
    )
    assert [n.depth for n in made.nodes] == [0, 1, 1]
    assert made.nodes[1].text == made.nodes[2].text == "Ana starts with 12. 12+5=17. #### 17"
    assert made.nodes[0].value == 1.0


async def test_a_seed_makes_a_tree_reproducible_under_load(client: httpx.AsyncClient) -> None:
    alone = await tree(client, sampling={"max_tokens": 40, "seed": 9})
    among = await asyncio.gather(
        *(tree(client, sampling={"max_tokens": 40, "seed": seed}) for seed in (9, 10, 11, 12))
    )
    tokens = [[n.token_ids for n in one.nodes] for one in (alone, *among)]
    assert tokens[0] == tokens[1]
    assert tokens[1] != tokens[2]
    leaves = [tuple(among[0].response_token_ids(leaf.id)) for leaf in among[0].leaves()]
    assert len(set(leaves)) > 1


async def test_metrics_tell_what_happened(client: httpx.AsyncClient) -> None:
    async def values() -> dict[str, float]:
        lines = (await client.get("/metrics")).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    before = await values()
    made = await tree(client, request_id="metrics")
    await tree(client, request_id="metrics")
    assert (await client.post("/rollout_tree", json=body(plan={}))).status_code == 422
    assert (await client.get("/no-such-path")).status_code == 404
    after = await values()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('spoke_trees_total{outcome="ok"}') == 1
    assert grown('spoke_trees_total{outcome="repeated"}') == 1
    assert grown("spoke_sampled_tokens_total") == made.usage.sampled_tokens
    prefill = {
        k: grown(f'spoke_prefill_tokens_total{{source="{k}"}}') for k in ("computed", "cached")
    }
    assert prefill == {
        "computed": made.usage.computed_prefill_tokens,
        "cached": made.usage.cached_tokens,
    }
    for name in ("queue", "first_node", "reward"):
        assert grown(f"spoke_tree_{name}_seconds_count") == 1
    assert grown('spoke_reward_leaves_total{reward="gsm8k"}') > 0
    assert grown('spoke_http_requests_total{method="POST",path="/rollout_tree",status="200"}') == 2
    assert grown('spoke_http_requests_total{method="POST",path="/rollout_tree",status="422"}') == 1
    assert grown('spoke_http_requests_total{method="GET",path="other",status="404"}') == 1
    assert after['spoke_state{state="ready"}'] == 1
    assert after['spoke_reward_retries_total{reward="gsm8k"}'] == 0
    assert after["spoke_tasks"] > 0
    assert after["spoke_weight_version"] == 0
    assert after["spoke_trees_in_flight"] == after["spoke_trees_waiting"] == 0


async def test_the_same_id_gives_the_same_tree(client: httpx.AsyncClient) -> None:
    sampling = {"max_tokens": 40}  # no seed: only the id can make them equal
    first, second = await asyncio.gather(
        *(tree(client, request_id="twice", sampling=sampling) for _ in range(2))
    )
    assert first == second
    assert first.request_id == "twice"
    answer = await client.post("/rollout_tree", json=body(request_id="twice"))
    assert answer.status_code == 409
    assert answer.json()["field"] == "request_id"
    assert answer.json()["request_id"] == "twice"


async def test_a_stop_string_ends_a_response_across_segments(client: httpx.AsyncClient) -> None:
    made = await tree(
        client, plan={"kind": "tree", "branch_factors": [1] * 12, "segment_tokens": 3},
        sampling={"temperature": 0.0, "max_tokens": 100, "stop": ["12+5"]},
    )  # fmt: skip
    leaf = next(made.leaves())
    text = "".join(node.text for node in made.path(leaf.id))
    assert text == "Ana starts with 12. 12+5"
    assert leaf.finish_reason == "stop"


async def test_prompts_as_tokens_and_without_reward_or_text(client: httpx.AsyncClient) -> None:
    ids = (await tree(client)).nodes[0].token_ids
    made = await tree(client, prompt=None, prompt_token_ids=ids, reward=None, return_text=False)
    assert made.nodes[0].token_ids == ids
    assert {n.value for n in made.nodes} == {n.text for n in made.nodes} == {None}


async def test_unfinished_responses_get_the_reward_they_were_promised(
    client: httpx.AsyncClient,
) -> None:
    reward = {"name": "gsm8k", "reference": "17", "options": {"unfinished": -0.5}}
    made = await tree(client, sampling={"max_tokens": 2}, reward=reward)
    assert {leaf.reward for leaf in made.leaves()} == {-0.5}


BAD = [
    ({"plan": None}, 422, "plan"),
    ({"plan": {"kind": "forest"}}, 422, "plan"),
    (
        {"plan": {"kind": "tree", "branch_factors": [0], "segment_tokens": 5}},
        422,
        "plan.branch_factors.0",
    ),
    (
        {"plan": {"kind": "tree", "branch_factors": [], "segment_tokens": 5}},
        422,
        "plan.branch_factors",
    ),
    ({"plan": {"kind": "tree", "branch_factors": [2]}}, 422, "plan.segment_tokens"),
    ({"plan": {"kind": "group", "samples": 2, "sample": 2}}, 422, "plan.sample"),
    ({"prompt": None}, 422, "body"),
    ({"prompt_token_ids": [1]}, 422, "body"),
    ({"prompt": ""}, 422, "prompt"),
    ({"prompt": None, "prompt_token_ids": [100_000]}, 422, "prompt_token_ids"),
    ({"prompt": None, "prompt_token_ids": [-1]}, 422, "prompt_token_ids.0"),
    ({"prompt": "12 " * 2000}, 422, "prompt"),
    ({"prompt": None, "messages": [{"role": "user", "content": "hi"}]}, 422, "messages"),
    ({"sampling": {"temperature": -1}}, 422, "sampling.temperature"),
    ({"sampling": {"top_p": 0}}, 422, "sampling.top_p"),
    ({"sampling": {"max_tokens": 0}}, 422, "sampling.max_tokens"),
    ({"sampling": {"max_token": 5}}, 422, "sampling.max_token"),
    ({"sampling": {"seed": "x"}}, 422, "sampling.seed"),
    ({"reward": {"name": "gsm9k", "reference": "17"}}, 422, "reward.name"),
    ({"reward": {"name": "gsm8k", "reference": "seventeen"}}, 422, "reward.reference"),
    ({"min_weight_version": 7}, 409, "min_weight_version"),
    ({"max_tokens": 7}, 422, "max_tokens"),
]


@pytest.mark.parametrize(("changes", "status", "field"), BAD, ids=lambda value: str(value)[:60])
async def test_bad_input_names_the_field(
    client: httpx.AsyncClient, changes: dict[str, Any], status: int, field: str
) -> None:
    answer = await client.post("/rollout_tree", json=body(**changes))
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["field"]) == (status, status, field), (
        problem
    )
    assert answer.headers["content-type"] == "application/problem+json"
    assert field in problem["detail"] or field == "body"


async def test_other_errors_are_problem_documents_too(client: httpx.AsyncClient) -> None:
    broken = await client.post(
        "/rollout_tree", content=b"{", headers={"content-type": "application/json"}
    )
    nowhere = await client.get("/nowhere")
    wrong = await client.get("/rollout_tree")
    for answer, status in ((broken, 400), (nowhere, 404), (wrong, 405)):
        assert answer.status_code == answer.json()["status"] == status
        assert answer.headers["content-type"] == "application/problem+json"


async def test_probes_and_info(client: httpx.AsyncClient) -> None:
    assert (await client.get("/livez")).json() == {"status": "alive"}
    assert (await client.get("/readyz")).json() == {
        "status": "ready", "version": 0, "head": None, "lag": 0, "max_staleness": None,
    }  # fmt: skip
    info = (await client.get("/info")).json()
    assert info["engine"] == "transformers"
    assert info["limits"]["max_model_len"] > 0
    assert "temperature" in info["logprobs"]
    assert {"gsm8k", "math"} <= set(info["rewards"])
