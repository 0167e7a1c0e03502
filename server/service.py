"""The rollout service: one engine, its rewards, and the answer to one request.

request -> prompt token ids -> sampler (engine) -> tree of branches -> rewards at the leaves -> values -> answer
"""

import secrets
import time
from dataclasses import dataclass, field
from functools import partial

from server.answer import grade, unquoted, wire_nodes
from server.continuations import Continuations
from server.engines.base import Engine
from server.idempotency import OnlyOnce
from server.rewards.pool import RewardPool
from server.sampler import sample
from server.tokens import Tokens
from shared.digests import sha256
from shared.errors import RequestError
from shared.fleet import ServerState
from shared.wire import (
    ChainPlan,
    RolloutTreeRequest,
    RolloutTreeResponse,
    Timing,
    Usage,
    WeightVersions,
)

TOKEN_CHARS = 256
"""No tokenizer's longest token has more characters."""


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
            with unquoted(reward):
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
        texts = {
            "prompt": request.prompt or "",
            "messages": "".join(m.content for m in request.messages or ()),
        }
        for name, text in texts.items():
            longest = self.engine.info.max_model_len * TOKEN_CHARS
            if len(text) > longest:  # before it is tokenised, which takes time
                raise RequestError(
                    name,
                    f"{len(text)} characters cannot fit a context of {self.engine.info.max_model_len} tokens; "
                    "shorten it",
                )
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
        continuations = Continuations(
            engine=self.engine,
            tokens=self.tokens,
            prompt=prompt,
            sampling=request.sampling,
            seed=secrets.randbits(62) if seed is None else seed,
        )
        started = time.monotonic()
        self.status.in_flight += 1
        try:
            root = await sample(request.plan, continuations)
            sampled = time.monotonic()
            grades = await grade(root, self.tokens, self.rewards, request.reward)
            nodes = wire_nodes(root, prompt, grades, self.tokens if request.return_text else None)
        finally:
            self.status.in_flight -= 1
        counts = continuations.counts
        self.status.sampled_tokens += counts.sampled
        versions = [v for node in nodes for v, _ in node.versions] or [self.engine.version]
        tree = RolloutTreeResponse(
            request_id=request_id,
            nodes=nodes,
            server_id=self.status.server_id,
            model=self.model,
            usage=Usage(
                prompt_tokens=len(prompt),
                sampled_tokens=counts.sampled,
                computed_prefill_tokens=counts.computed_prefill,
                cached_tokens=counts.cached,
            ),
            weight_versions=WeightVersions(min=min(versions), max=max(versions)),
            timing=Timing(
                queue_s=started - arrived,
                sample_s=sampled - started,
                reward_s=time.monotonic() - sampled,
            ),
        )
        if request.reward is None:
            return tree
        return tree.with_values(chain=isinstance(request.plan, ChainPlan))
