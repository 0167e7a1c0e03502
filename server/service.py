"""The rollout service: one engine, its rewards, and the answer to one request.

request -> prompt token ids -> sampler (engine) -> tree of branches -> rewards at the leaves -> values -> answer
"""

import secrets
import time
from dataclasses import dataclass, field
from functools import partial

from server.engines.base import Engine
from server.idempotency import OnlyOnce
from server.rewards.pool import RewardPool
from server.sampler import Branch, Sampler
from server.tokens import Tokens
from shared.digests import sha256
from shared.errors import RequestError
from shared.fleet import ServerState
from shared.tree import FinishReason, Node, Role
from shared.wire import (
    Reward,
    RolloutTreeRequest,
    RolloutTreeResponse,
    Timing,
    Usage,
    WeightVersions,
)


@dataclass(slots=True, kw_only=True)
class Status:
    """What a server knows of itself; the fleet table shows it."""

    server_id: str
    state: ServerState = ServerState.LOADING
    weights_digest: str = ""
    """Of the weights in the engine; empty for the checkpoint it started from."""
    last_error: str | None = None
    in_flight: int = 0
    sampled_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutService:
    """Answers `POST /rollout_tree`.

    Args:
        engine: samples tokens.
        tokens: the model's tokenizer.
        rewards: grades responses.
        status: shared with the follower, which changes its state.
        model: name that answers carry.
    """

    engine: Engine
    tokens: Tokens
    rewards: RewardPool
    status: Status
    model: str
    _once: OnlyOnce[RolloutTreeResponse] = field(default_factory=OnlyOnce)

    async def rollout_tree(self, request: RolloutTreeRequest) -> RolloutTreeResponse:
        """Sample and grade one tree.

        Raises:
            RequestError: the request cannot be served as it stands.
            EngineError: the engine failed.
        """
        arrived = time.monotonic()
        if request.reward is not None:
            reward = request.reward
            await self.rewards.check(reward.name, reward.reference, reward.options)
        if request.min_weight_version > self.engine.version:
            raise RequestError(
                "min_weight_version",
                f"this server holds version {self.engine.version}; ask another one, or later",
                status=409,
            )
        prompt = self._prompt(request)
        request_id = request.request_id or f"tree-{secrets.token_hex(8)}"
        make = partial(self._make, request, prompt, request_id, arrived)
        if request.request_id is None:
            return await make()
        return await self._once.get(request_id, sha256(request.model_dump_json().encode()), make)

    def _prompt(self, request: RolloutTreeRequest) -> tuple[int, ...]:
        """[P] token ids of the prompt, checked against the engine's limits."""
        if request.prompt is not None:
            name, ids = "prompt", self.tokens.encode(request.prompt)
        elif request.messages is not None:
            name, ids = "messages", self.tokens.encode_chat(request.messages)
        else:
            name, ids = "prompt_token_ids", request.prompt_token_ids or []
        info = self.engine.info
        if not ids:
            raise RequestError(name, "it has no tokens; write something")
        if max(ids) >= info.vocab_size:
            raise RequestError(
                name, f"token {max(ids)} is outside the vocabulary of {info.vocab_size}"
            )
        if len(ids) >= info.max_model_len:
            raise RequestError(
                name,
                f"{len(ids)} tokens leave no room in a context of {info.max_model_len}; shorten it",
            )
        return tuple(ids)

    async def _make(
        self,
        request: RolloutTreeRequest,
        prompt: tuple[int, ...],
        request_id: str,
        arrived: float,
    ) -> RolloutTreeResponse:
        seed = request.sampling.seed
        sampler = Sampler(
            engine=self.engine,
            tokens=self.tokens,
            prompt=prompt,
            plan=request.plan,
            sampling=request.sampling,
            seed=secrets.randbits(62) if seed is None else seed,
        )
        started = time.monotonic()
        self.status.in_flight += 1
        try:
            root = await sampler.sample()
            sampled = time.monotonic()
            nodes = await self._nodes(root, prompt, request)
        finally:
            self.status.in_flight -= 1
        self.status.sampled_tokens += sampler.counts.sampled
        versions = [v for node in nodes for v, _ in node.versions] or [self.engine.version]
        tree = RolloutTreeResponse(
            request_id=request_id,
            nodes=nodes,
            server_id=self.status.server_id,
            model=self.model,
            usage=Usage(
                prompt_tokens=len(prompt),
                sampled_tokens=sampler.counts.sampled,
                computed_prefill_tokens=sampler.counts.computed_prefill,
                cached_tokens=sampler.counts.cached,
            ),
            weight_versions=WeightVersions(min=min(versions), max=max(versions)),
            timing=Timing(
                queue_s=started - arrived,
                sample_s=sampled - started,
                reward_s=time.monotonic() - sampled,
            ),
        )
        return tree if request.reward is None else tree.with_values()

    async def _nodes(
        self, root: Branch, prompt: tuple[int, ...], request: RolloutTreeRequest
    ) -> list[Node]:
        """The tree's nodes on the wire, leaves graded."""
        branches = list(root.walk())
        ids = {branch.path: position for position, branch in enumerate(branches)}
        grades = await self._grades(branches, request.reward)
        nodes = [
            Node(
                id=0,
                parent=None,
                depth=0,
                role=Role.PROMPT,
                token_ids=list(prompt),
                text=self.tokens.decode(prompt) if request.return_text else None,
            )
        ]
        for position, branch in enumerate(branches[1:], start=1):
            completion = branch.completion
            assert completion is not None, "only the prompt has no completion"
            reward, error = grades.get(position, (None, None))
            nodes.append(
                Node(
                    id=position,
                    parent=ids[branch.path[:-1]],
                    depth=len(branch.path),
                    token_ids=completion.token_ids,
                    logprobs=completion.logprobs,
                    versions=completion.versions,
                    finish_reason=completion.finish_reason,
                    text=self._text(branch) if request.return_text else None,
                    reward=reward,
                    reward_error=error,
                )
            )
        return nodes

    def _text(self, branch: Branch) -> str:
        """The part of the response's text that this node adds: a piece may span two nodes' tokens."""
        assert branch.completion is not None, "only the prompt has no completion"
        before = branch.response[: len(branch.response) - len(branch.completion.token_ids)]
        head, whole = self.tokens.decode(before), self.tokens.decode(branch.response)
        return (
            whole[len(head) :]
            if whole.startswith(head)
            else self.tokens.decode(branch.completion.token_ids)
        )

    async def _grades(
        self, branches: list[Branch], reward: Reward | None
    ) -> dict[int, tuple[float, str | None]]:
        """(reward, error) of each leaf, by its position: the whole response, never the prompt."""
        if reward is None:
            return {}
        unfinished = float(reward.options.get("unfinished", 0.0))
        grades: dict[int, tuple[float, str | None]] = {}
        finished: list[int] = []
        for position, branch in enumerate(branches):
            if branch.completion is None or branch.children:
                continue
            if branch.completion.finish_reason is FinishReason.STOP:
                finished.append(position)
            elif branch.completion.finish_reason is FinishReason.LENGTH:
                grades[position] = (unfinished, None)
            else:
                grades[position] = (0.0, "the engine aborted this response")
        texts = [self.tokens.decode(branches[position].response) for position in finished]
        graded = await self.rewards.grade(reward.name, texts, reward.reference, reward.options)
        grades.update(
            (position, (grade.reward, grade.error))
            for position, grade in zip(finished, graded, strict=True)
        )
        return grades
