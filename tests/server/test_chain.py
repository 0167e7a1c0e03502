"""The chain plan on a real engine, request by request.

1. Boundaries are where the partition says, by the nodes' own tokens and logprobs; nodes come as ChainPlan says.
2. Rollouts of a boundary are one engine request: the prompt and exactly the tokens before the boundary.
3. A state that several responses reach is sampled, graded and counted once, and stands below each of its nodes.
4. Responses are those of a group plan with the same seed; the same seed gives the same tree.
5. Values are means of a node's rollouts; rewards are of the text from the prompt's end.
6. Prefixes come from the engine's cache; usage is the sum over what was sampled.
7. Stop strings, limits, versions and aborted responses keep to their meaning at every boundary.
8. Rollouts start while their responses grow; the tree is the same as if they had waited, and none is in vain.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from server.admission import Gate
from server.branches import Branch, walk
from server.chain import sample_chain
from server.continuations import Continuations
from server.costs import Cost
from server.engines.base import (
    ApplyReport,
    Engine,
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Weights,
)
from server.engines.settings import EngineSettings
from server.engines.transformers import open_engine
from server.metrics import Metrics
from server.rewards import RewardPool
from server.service import RolloutService
from server.status import Status
from server.tokens import Tokens
from shared.errors import EngineError
from shared.tree import FinishReason, Node, Role
from shared.wire import RolloutTreeRequest, RolloutTreeResponse

pytestmark = pytest.mark.asyncio(loop_scope="module")

STORY = "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n"
SAMPLES, ROLLOUTS, LIMIT = 4, 3, 40
PARTITIONS: list[dict[str, Any]] = [
    {"kind": "fixed", "tokens": 7},
    {"kind": "cutpoints", "threshold": 0.9, "interval": 1},
    {"kind": "delimiter", "delimiter": "."},
    {"kind": "whole"},
]
REWARD = '''
def last_digit(response, reference, options):
    """Writes down what it grades."""
    with open(reference, "a") as log:
        log.write(response + "\\x00")
    return float(sum(map(ord, response)) % 7)
'''


class Recorder:
    """The real engine, and what was asked of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked: list[tuple[GenerateRequest, GenerateResult]] = []
        self.early = 0
        """Rollout requests that began before the responses were there."""
        self.change = lambda request, result: result

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def version(self) -> int:
        return self.engine.version

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.early += request.samples == ROLLOUTS and all(
            other.samples == ROLLOUTS for other, _ in self.asked
        )
        result = self.change(request, await self.engine.generate(request))
        self.asked.append((request, result))
        return result

    async def load_weights(self, weights: Weights) -> ApplyReport:
        return await self.engine.load_weights(weights)

    @property
    def digest(self) -> str:
        return self.engine.digest

    async def live_digests(self, dtype: str) -> dict[str, str]:
        return await self.engine.live_digests(dtype)

    async def check(self) -> None:
        await self.engine.check()

    async def close(self) -> None:
        await self.engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_math: Path) -> AsyncIterator[Engine]:
    opened = await open_engine(EngineSettings(model=str(tiny_math), dtype="float32"))
    yield opened
    await opened.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rewards(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RewardPool]:
    folder = tmp_path_factory.mktemp("reward")
    (folder / "chain_reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        pool = RewardPool({"last_digit": "chain_reward:last_digit"}, workers=1)
        yield pool
        await pool.close()


@pytest.fixture(scope="module")
def tokens(tiny_math: Path) -> Tokens:
    return Tokens.load(str(tiny_math))


@pytest_asyncio.fixture(loop_scope="module")
async def service(engine: Engine, rewards: RewardPool, tokens: Tokens) -> RolloutService:
    """A service on an engine that remembers no prefix."""
    await asyncio.wrap_future(engine._worker.call(lambda batch: batch._store.clear()))
    return RolloutService(
        engine=Recorder(engine),
        tokens=tokens,
        rewards=rewards,
        status=Status(server_id="test"),
        model="tiny",
        gate=Gate(Cost(nodes=1 << 20, tokens=1 << 30)),
        budget=Cost(nodes=1 << 20, tokens=1 << 30),
        metrics=Metrics(),
    )


def body(partition: dict[str, Any], log: Path | None = None, **sampling: Any) -> dict[str, Any]:
    plain = {"temperature": 1.5, "max_tokens": LIMIT, "seed": 3}
    reward = {"name": "last_digit", "reference": str(log), "options": {"unfinished": -1.0}}
    return {
        "prompt": STORY,
        "plan": {
            "kind": "chain",
            "samples": SAMPLES,
            "partition": partition,
            "value_rollouts": ROLLOUTS,
        },
        "sampling": plain | sampling,
        "reward": reward if log else None,
    }


async def chain(
    service: RolloutService, partition: dict[str, Any], log: Path | None = None, **sampling: Any
) -> RolloutTreeResponse:
    request = RolloutTreeRequest.model_validate(body(partition, log, **sampling))
    return await asyncio.wait_for(service.rollout_tree(request), 60)


async def until(engine: Engine, condition: Any) -> None:
    """Wait until the batch, seen between two steps, meets a condition."""

    async def poll() -> None:
        while not await asyncio.wrap_future(engine._worker.call(condition)):
            pass

    await asyncio.wait_for(poll(), 60)


def responses(tree: RolloutTreeResponse) -> list[list[Node]]:
    """The segments of each response."""
    return [tree.path(leaf.id) for leaf in tree.leaves() if leaf.role is Role.SEGMENT]


def rollouts(tree: RolloutTreeResponse, node_id: int) -> list[Node]:
    below = [tree.nodes[child] for child in tree.children[node_id]]
    return [node for node in below if node.role is Role.ROLLOUT]


def expected_boundaries(
    partition: dict[str, Any], segments: list[Node], tokens: Tokens
) -> list[int]:
    """Where a response's boundaries should be, from the definitions."""
    ids = [token for node in segments for token in node.token_ids]
    logprobs = [x for node in segments for x in node.logprobs]
    match partition["kind"]:
        case "fixed":
            return [b for b in range(len(ids)) if b % partition["tokens"] == 0]
        case "cutpoints":
            below = [t for t, x in enumerate(logprobs) if x < math.log(partition["threshold"])]
            return below[:: partition["interval"]]
        case "delimiter":
            counts = [tokens.decode(ids[:t]).count(partition["delimiter"]) for t in range(len(ids))]
            return [b for b in range(len(ids)) if b == 0 or counts[b] > counts[b - 1]]
    return [0]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p["kind"])
async def test_nodes_come_as_the_plan_says(
    service: RolloutService, tokens: Tokens, partition: dict[str, Any]
) -> None:
    tree = await chain(service, partition)
    found = responses(tree)
    assert len(found) == SAMPLES
    at_prompt = False
    for segments in found:
        boundaries = expected_boundaries(partition, segments, tokens)
        at_prompt |= boundaries[:1] == [0]
        ends = [len(tree.response_token_ids(node.id)) for node in segments]
        assert ends[:-1] == [b for b in boundaries if b]
        for node in segments[:-1]:
            below = [tree.nodes[child].role for child in tree.children[node.id]]
            assert below == [Role.ROLLOUT] * ROLLOUTS + [Role.SEGMENT]
            assert node.finish_reason is FinishReason.LENGTH
        assert segments[-1].finish_reason is not FinishReason.ABORT
        assert not tree.children[segments[-1].id]
    roles = [tree.nodes[child].role for child in tree.children[0]]
    assert roles == [Role.ROLLOUT] * ROLLOUTS * at_prompt + [Role.SEGMENT] * SAMPLES
    for leaf in tree.leaves():
        length = len(tree.response_token_ids(leaf.id))
        assert length == LIMIT or leaf.finish_reason is FinishReason.STOP
        assert length <= LIMIT
    if partition["kind"] != "whole":
        assert max(map(len, found)) > 2


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p["kind"])
async def test_rollouts_start_from_the_exact_tokens(
    service: RolloutService, partition: dict[str, Any]
) -> None:
    tree = await chain(service, partition)
    prompt = tuple(tree.prompt_token_ids)
    asked = service.engine.asked
    ((first, whole),) = (pair for pair in asked if pair[0].samples == SAMPLES)
    others = [pair for pair in asked if pair[0] is not first]
    assert (first.prompt_token_ids, first.max_tokens) == (prompt, LIMIT)
    by_state = {request.prompt_token_ids[len(prompt) :]: result for request, result in others}
    assert len(by_state) == len(others)  # none is asked for twice
    states = set()
    for node in tree.nodes:
        below = rollouts(tree, node.id)
        if not below:
            continue
        state = tuple(tree.response_token_ids(node.id))
        states.add(state)
        sampled = [(c.token_ids, c.logprobs) for c in by_state[state].completions]
        assert [(n.token_ids, n.logprobs) for n in below] == sampled
    assert states == set(by_state)
    for request, _ in others:
        state = request.prompt_token_ids[len(prompt) :]
        assert request.samples == ROLLOUTS
        assert request.max_tokens == LIMIT - len(state)
    seeds = {request.seed for request, _ in service.engine.asked}
    assert len(seeds) == len(service.engine.asked)
    whole_tokens = [c.token_ids for c in whole.completions]
    assert [tree.response_token_ids(r[-1].id) for r in responses(tree)] == whole_tokens
    usage = [result for _, result in service.engine.asked]
    assert tree.usage.sampled_tokens == sum(len(c.token_ids) for r in usage for c in r.completions)
    # Every prefix was computed when the prompt or the response was sampled: a rollout takes its last token alone.
    computed = len(prompt) - 1 + SAMPLES + ROLLOUTS * len(states)
    assert tree.usage.computed_prefill_tokens == computed
    assert (
        tree.usage.cached_tokens
        == sum(
            request.samples * len(request.prompt_token_ids) for request, _ in service.engine.asked
        )
        - computed
    )


async def test_equal_responses_share_their_rollouts(
    service: RolloutService, tmp_path: Path
) -> None:
    tree = await chain(service, PARTITIONS[0], tmp_path / "log", temperature=0.0)
    first, *others = responses(tree)
    assert len(first) > 2
    assert len(service.engine.asked) == 1 + len(first)  # the prompt is a boundary
    for other in others:
        for mine, yours in zip(first, other, strict=True):
            assert mine.id != yours.id
            assert mine.value == yours.value
            below = [[n.token_ids for n in rollouts(tree, x.id)] for x in (mine, yours)]
            assert below[0] == below[1]
    once = sum(len(c.token_ids) for _, r in service.engine.asked for c in r.completions)
    assert tree.usage.sampled_tokens == once < sum(len(n.token_ids) for n in tree.nodes[1:])


async def test_responses_are_those_of_a_group(service: RolloutService) -> None:
    tree = await chain(service, PARTITIONS[1])
    plan = {"kind": "group", "samples": SAMPLES}
    group = await service.rollout_tree(
        RolloutTreeRequest.model_validate(body(PARTITIONS[1]) | {"plan": plan})
    )
    found = [tree.response_token_ids(segments[-1].id) for segments in responses(tree)]
    assert found == [node.token_ids for node in group.nodes[1:]]


async def test_the_same_seed_gives_the_same_tree(service: RolloutService) -> None:
    alone = await chain(service, PARTITIONS[1])
    same, other = await asyncio.gather(
        chain(service, PARTITIONS[1]), chain(service, PARTITIONS[1], seed=4)
    )
    tokens = [[(n.role, n.depth, n.token_ids) for n in t.nodes] for t in (alone, same, other)]
    assert tokens[0] == tokens[1] != tokens[2]


async def test_values_and_rewards(service: RolloutService, tokens: Tokens, tmp_path: Path) -> None:
    log = tmp_path / "graded"
    tree = await chain(service, PARTITIONS[1], log)
    graded = log.read_text().split("\0")[:-1]
    for leaf in tree.leaves():
        text = tokens.decode(tree.response_token_ids(leaf.id))
        assert text == "".join(node.text for node in tree.path(leaf.id))
        if leaf.finish_reason is FinishReason.STOP:
            assert leaf.reward == float(sum(map(ord, text)) % 7)
            assert text in graded
        else:
            assert leaf.reward == -1.0
        assert leaf.value == leaf.reward
    inner = [node for node in tree.nodes if tree.children[node.id]]
    for node in inner:
        below = [child.reward for child in rollouts(tree, node.id)]
        assert node.reward is None
        assert node.value == (pytest.approx(sum(below) / ROLLOUTS) if below else None)
    assert len({node.value for node in inner}) > 2


async def test_without_a_reward_or_text(service: RolloutService) -> None:
    request = body(PARTITIONS[0]) | {"return_text": False}
    tree = await service.rollout_tree(RolloutTreeRequest.model_validate(request))
    assert {(n.value, n.reward, n.text) for n in tree.nodes} == {(None, None, None)}


@pytest.mark.parametrize("tokens_each", [1, 3])
async def test_a_stop_string_ends_responses_and_rollouts_across_boundaries(
    service: RolloutService, tokens: Tokens, tokens_each: int
) -> None:
    partition = {"kind": "fixed", "tokens": tokens_each}
    free = await chain(service, partition)
    tree = await chain(service, partition, stop=["12+5"])
    stopped = 0
    for leaf in tree.leaves():
        ids = tree.response_token_ids(leaf.id)
        text = tokens.decode(ids)
        stopped += "12+5" in text
        if "12+5" in text:
            assert leaf.finish_reason is FinishReason.STOP
            assert "12+5" not in tokens.decode(ids[:-1])
    assert stopped > SAMPLES
    assert max(node.depth for node in tree.nodes) < max(node.depth for node in free.nodes)
    inner = [tree.response_token_ids(node.id) for node in tree.nodes if tree.children[node.id]]
    assert not any("12+5" in tokens.decode(ids) for ids in inner)


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 8])
async def test_no_response_or_rollout_passes_the_limit(
    service: RolloutService, tmp_path: Path, max_tokens: int
) -> None:
    tree = await chain(service, PARTITIONS[0], tmp_path / "log", max_tokens=max_tokens)
    leaves = list(tree.leaves())
    assert {len(tree.response_token_ids(leaf.id)) for leaf in leaves} == {max_tokens}
    assert {leaf.reward for leaf in leaves} == {-1.0}
    # A boundary at 7 needs an eighth token behind it.
    assert {len(segments) for segments in responses(tree)} == {1 + (max_tokens > 7)}


async def test_a_response_runs_to_the_end_of_the_context(service: RolloutService) -> None:
    room = 9
    context = service.engine.info.max_model_len
    prompt = [5 + i % 300 for i in range(context - room)]
    request = body(PARTITIONS[0], max_tokens=100)
    request = {**request, "prompt": None, "prompt_token_ids": prompt}
    tree = await service.rollout_tree(RolloutTreeRequest.model_validate(request))
    for leaf in tree.leaves():
        length = len(tree.response_token_ids(leaf.id))
        assert length == room or leaf.finish_reason is FinishReason.STOP


async def test_versions_are_cut_with_their_tokens(
    service: RolloutService, engine: Engine, tiny_math: Path, tmp_path: Path
) -> None:
    noise = torch.Generator().manual_seed(0)
    old = load_file(tiny_math / "model.safetensors")
    new = {k: v + 0.01 * v.std() * torch.randn(v.shape, generator=noise) for k, v in old.items()}
    save_file(new, tmp_path / "new.safetensors")
    before = (await engine.times()).tokens
    growing = asyncio.create_task(
        chain(service, {"kind": "fixed", "tokens": 20}, temperature=2.0, max_tokens=300)
    )
    await until(engine, lambda batch: batch.times.tokens > before + 30 * SAMPLES)
    await engine.load_weights(
        Weights(version=7, digest="new", files=(tmp_path / "new.safetensors",))
    )
    try:
        tree = await growing
    finally:
        await engine.load_weights(
            Weights(version=0, digest="old", files=(tiny_math / "model.safetensors",))
        )
    spans = [
        [v for node in segments for v, count in node.versions for _ in range(count)]
        for segments in responses(tree)
    ]
    assert all(by_token == sorted(by_token) for by_token in spans)
    assert any(set(by_token) == {0, 7} for by_token in spans)
    assert (tree.weight_versions.min, tree.weight_versions.max) == (0, 7)


async def test_an_aborted_response_keeps_what_it_has(
    service: RolloutService, tmp_path: Path
) -> None:
    def abort(request: GenerateRequest, result: GenerateResult) -> GenerateResult:
        """The first response and a rollout of each state end before their first token, another after nine."""
        first, second, *others = (
            replace(
                c, token_ids=c.token_ids[:keep], logprobs=c.logprobs[:keep],
                versions=[(0, keep)] if keep else [], finish_reason=FinishReason.ABORT,
            ) if i < 2 - (request.samples == ROLLOUTS) else c
            for i, (c, keep) in enumerate(zip(result.completions, (0, 9, 0, 0), strict=False))
        )  # fmt: skip
        return replace(result, completions=[first, second, *others])

    service.engine.change = abort
    tree = await chain(service, PARTITIONS[0], tmp_path / "log")
    empty, cut, *_ = responses(tree)
    assert [node.token_ids for node in empty] == [[]]
    assert [len(node.token_ids) for node in cut] == [7, 2]
    assert [r[0].finish_reason for r in (empty, cut[1:])] == [FinishReason.ABORT] * 2
    assert (empty[0].reward, empty[0].reward_error) == (0.0, "the engine aborted this response")
    aborted, *kept = rollouts(tree, cut[0].id)
    assert aborted.finish_reason is FinishReason.ABORT
    assert cut[0].value == pytest.approx(sum(n.reward for n in kept) / len(kept))


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p["kind"])
@pytest.mark.parametrize("stop", [[], ["12+5"], ["1"]], ids=str)
async def test_starting_early_changes_nothing(
    service: RolloutService, tokens: Tokens, partition: dict[str, Any], stop: list[str]
) -> None:
    request = RolloutTreeRequest.model_validate(body(partition, stop=stop))
    grown = {}
    for early in (False, True):
        service.engine.asked.clear()
        service.engine.early = 0
        continuations = Continuations(
            engine=service.engine,
            tokens=tokens,
            prompt=tuple(tokens.encode(STORY)),
            sampling=request.sampling,
            seed=3,
        )
        root = await asyncio.wait_for(sample_chain(request.plan, continuations, early=early), 60)
        grown[early] = [(p.parent, p.branch.role, p.branch.response) for p in walk(root)]
        # Nothing was rolled out in vain.
        unique = {p.branch for p in walk(root) if p.branch.role is Role.ROLLOUT}
        assert len(unique) == ROLLOUTS * (len(service.engine.asked) - 1)
        assert early or service.engine.early == 0
        if early and stop != ["1"]:  # which ends responses at their first tokens
            assert service.engine.early > 0
    assert grown[True] == grown[False]


async def test_cancelling_ends_what_runs(service: RolloutService, engine: Engine) -> None:
    growing = asyncio.create_task(chain(service, PARTITIONS[0], temperature=2.0, max_tokens=300))
    await until(engine, lambda batch: batch._rows.count > SAMPLES)  # rollouts run, too
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    await until(engine, lambda batch: not batch.busy)
    assert service.status.in_flight == 0


async def test_an_engine_that_fails_fails_the_request(
    service: RolloutService, engine: Engine
) -> None:
    def fail(request: GenerateRequest, result: GenerateResult) -> GenerateResult:
        raise EngineError("on purpose")

    service.engine.change = fail
    with pytest.raises(EngineError, match="on purpose"):
        await chain(service, PARTITIONS[0], temperature=2.0, max_tokens=300)
    await until(engine, lambda batch: not batch.busy)


async def test_a_chain_may_be_deeper_than_pythons_stack() -> None:
    leaf = root = Branch.prompt()
    for _ in range(5000):
        leaf.children.append(Branch(completion=None, response=()))
        leaf = leaf.children[0]
    places = list(walk(root))
    assert [place.depth for place in places] == list(range(5001))
    assert [place.parent for place in places] == [None, *range(5000)]


async def test_over_http(server_url: str) -> None:
    request = body(PARTITIONS[1]) | {"reward": {"name": "gsm8k", "reference": "17"}}
    async with httpx.AsyncClient(base_url=server_url, timeout=60.0) as client:
        answer = await client.post("/rollout_tree", json=request)
    assert answer.status_code == 200, answer.text
    tree = RolloutTreeResponse.model_validate(answer.json())
    assert len(responses(tree)) == SAMPLES
    for leaf in tree.leaves():
        text = "".join(node.text for node in tree.path(leaf.id))
        if leaf.finish_reason is FinishReason.STOP:
            assert leaf.reward == float(text.rstrip().endswith("#### 17"))
    assert tree.with_values(chain=True) == tree
