"""The rollout service: one engine, its rewards, and the answer to one request.

request -> checks -> place in the server -> sampler (engine) -> tree of branches -> rewards -> values -> answer

Every tree that grows is a task of its own, which drains, hands back and cancels by one way: `CancelledError`.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from server.admission import Admitted, Gate
from server.answer import wire_nodes
from server.branches import Branch, Path
from server.continuations import Continuations, Counts
from server.costs import Cost, expected, most, over_budget
from server.details import unquoted
from server.engines.base import Engine
from server.given import check_given, usable
from server.grading import Grading
from server.idempotency import OnlyOnce
from server.metrics import Metrics
from server.prompts import prompt_ids
from server.respond import OFF_LOOP_TOKENS
from server.restarts import Restarts
from server.rewards.pool import RewardPool
from server.sampler import sample
from server.status import Status
from server.tokens import Tokens
from shared.digests import sha256
from shared.errors import BusyError, RequestError
from shared.fleet import ServerState
from shared.wire import (
    ChainPlan,
    Plan,
    RolloutTreeRequest,
    RolloutTreeResponse,
    Timing,
    Usage,
    WeightVersions,
)

TOKEN_BYTES = 72
"""Memory of one token of an answer that is kept: its id and logprob as Python objects in lists."""
NODE_BYTES = 1000
GRADED_AT_ONCE = 64
"""Trees of one reward whose leaves are graded at once after they have left the engine."""
HAND_BACK_S = 2
"""Retry-After of what is handed back: another server may take it at once."""


def memory(tree: RolloutTreeResponse) -> int:
    """Bytes of an answer that is kept, roughly."""
    return sum(
        NODE_BYTES + TOKEN_BYTES * len(node.token_ids) + len(node.text or "") for node in tree.nodes
    )


@dataclass(frozen=True, slots=True)
class Teller:
    """Is told how a tree grows."""

    node: Callable[[Path, Branch], None]
    """Of each node when it is finished: its sibling positions from the prompt, and the node."""
    begun_anew: Callable[[int], None]
    """Of each new beginning, with the weight version: nodes told of before are no part of the tree."""


@dataclass(slots=True)
class _Ended:
    """How a request is counted."""

    well: str = "ok"
    """Where it ends well; `repeated` where its tree was there or on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutService:
    """Answers `POST /rollout_tree`.

    Args:
        engine: samples tokens.
        tokens: the model's tokenizer.
        rewards: grades responses.
        status: shared with the follower, which changes its state.
        model: name that answers carry.
        gate: how much is taken on at once.
        budget: most nodes and tokens of one tree.
        metrics: counts.
    """

    engine: Engine
    tokens: Tokens
    rewards: RewardPool
    status: Status
    model: str
    gate: Gate
    budget: Cost
    metrics: Metrics
    _once: OnlyOnce[RolloutTreeResponse] = field(default_factory=lambda: OnlyOnce(size=memory))
    _growing: set[asyncio.Task[RolloutTreeResponse]] = field(default_factory=set)
    _graders: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    """By name of the reward: one that hangs holds up no other."""
    _restarts: Restarts = field(default_factory=Restarts)

    def __post_init__(self) -> None:
        self.status.on_swap.append(self._restarts.swapped)

    async def rollout_tree(
        self, request: RolloutTreeRequest, tell: Teller | None = None, *, caller: str = ""
    ) -> RolloutTreeResponse:
        """Sample and grade one tree. Cancelling aborts it, unless another caller waits for the same.

        Args:
            request: what is asked.
            tell: is told how the tree grows; of nothing where it is already being made for another caller.
            caller: whose request ids are meant: another's are other trees.

        Raises:
            RequestError: the request cannot be served as it stands.
            BusyError: not now: the server is full or draining.
            EngineError: the engine failed.
        """
        arrived = time.monotonic()
        with self._outcome() as ended:
            prompt = await self._checked(request)
            request_id = request.request_id or f"tree-{secrets.token_hex(8)}"
            make = partial(self._grow, request, prompt, request_id, arrived, tell)
            if request.request_id is None:
                return await make()
            # Of what is asked for: given nodes are what another attempt has got of the same tree.
            digest = sha256(request.model_dump_json(exclude={"given"}).encode())
            caller = self._keeper(request, request_id, caller)
            if (caller, request_id) in self._once:  # asked for only now: two may come at one moment
                ended.well = "repeated"
            return await self._once.get(request_id, digest, make, caller)

    def _keeper(self, request: RolloutTreeRequest, request_id: str, caller: str) -> str:
        """For whom the tree is kept: one with given nodes, for those of the caller who give the very same ones.

        Given nodes are believed; so they must reach nobody else, who may use the same token and the same id.
        """
        if not request.given or (caller, request_id) in self._once:
            return caller
        return f"{caller} {sha256(request.model_dump_json(include={'given'}).encode())}"

    def hand_back(self) -> int:
        """Give up every tree that still grows; their callers are told to ask another server. How many."""
        growing = [task for task in self._growing if not task.done()]
        for task in growing:
            task.cancel()
        return len(growing)

    @contextlib.contextmanager
    def _outcome(self) -> Iterator["_Ended"]:
        """Count how a request ends."""
        outcome, ended = "failed", _Ended()
        try:
            yield ended
            outcome = ended.well
        except RequestError:
            outcome = "refused"
            raise
        except BusyError:
            outcome = "busy"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.trees.labels(outcome).inc()

    async def _checked(self, request: RolloutTreeRequest) -> tuple[int, ...]:
        """[P] token ids of the prompt, once nothing speaks against the request."""
        if request.min_weight_version > self.engine.version:
            raise RequestError(
                "min_weight_version",
                f"this server holds version {self.engine.version}; ask another one, or later",
                status=409,
            )
        prompt = await prompt_ids(request, self.tokens, self.engine.info)
        check_given(request, len(prompt), self.engine.info)
        cost = self._cost(request, prompt, most)
        if not cost.within(self.budget):
            raise over_budget(cost, self.budget)
        if request.reward is not None:
            reward = request.reward
            with unquoted(reward):
                await self.rewards.check(reward.name, reward.reference, reward.options)
        return prompt

    def _cost(
        self,
        request: RolloutTreeRequest,
        prompt: tuple[int, ...],
        measure: Callable[[Plan, int], Cost],
    ) -> Cost:
        """The most, or what to expect, of a request's plan and probe."""
        room = self.engine.info.max_model_len - len(prompt)
        length = min(request.sampling.max_tokens, room)
        cost, probe = measure(request.plan, length), request.savings.probe or 0
        return Cost(nodes=cost.nodes + probe, tokens=cost.tokens + probe * length)

    async def _grow(
        self,
        request: RolloutTreeRequest,
        prompt: tuple[int, ...],
        request_id: str,
        arrived: float,
        tell: Teller | None,
    ) -> RolloutTreeResponse:
        """The tree, in a task of its own, which `hand_back` may end."""
        task = asyncio.ensure_future(self._made(request, prompt, request_id, arrived, tell))
        self._growing.add(task)
        task.add_done_callback(self._growing.discard)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        if task.cancelled():
            raise BusyError("this server is going; ask another one", retry_after_s=HAND_BACK_S)
        return task.result()

    @contextlib.asynccontextmanager
    async def _place(
        self, request: RolloutTreeRequest, prompt: tuple[int, ...], arrived: float
    ) -> AsyncIterator[Admitted]:
        """A place in the server; the time that it took to get one is counted."""
        cost = self._cost(request, prompt, expected)
        async with self.gate.admitted(cost, request.plan.kind, len(prompt)) as admitted:
            self.metrics.queue_s.observe(time.monotonic() - arrived)
            yield admitted

    async def _made(
        self,
        request: RolloutTreeRequest,
        prompt: tuple[int, ...],
        request_id: str,
        arrived: float,
        tell: Teller | None,
    ) -> RolloutTreeResponse:
        seed = request.sampling.seed
        continuations = Continuations(
            engine=self.engine,
            tokens=self.tokens,
            prompt=prompt,
            sampling=request.sampling,
            seed=secrets.randbits(62) if seed is None else seed,
            budget=self.budget,
            reproducible=seed is not None,
        )
        grading = Grading(self.tokens, self.rewards, request.reward)
        async with self._place(request, prompt, arrived) as admitted:
            if self.status.state is ServerState.STALE:  # while it waited in line
                self.status.check()
            started = time.monotonic()
            root, continuations = await self._sampled(
                request, continuations, grading, arrived, tell
            )
            sampled = time.monotonic()
            admitted.came_to = continuations.counts.cost
            # Before the place is given up: rewards that cannot keep up hold back what comes next.
            graders = self._graders_of(request)
            await graders.acquire()
        try:
            await grading.below(root)
        finally:
            graders.release()
        timing = Timing(
            queue_s=started - arrived,
            sample_s=sampled - started,
            reward_s=time.monotonic() - sampled,
        )
        answer = partial(self._answer, request, request_id, root, grading, continuations, timing)
        large = continuations.counts.cost.tokens >= OFF_LOOP_TOKENS
        tree = await asyncio.to_thread(answer) if large else answer()
        self._count(tree, arrived, continuations.counts)
        return tree

    async def _sampled(
        self,
        request: RolloutTreeRequest,
        continuations: Continuations,
        grading: Grading,
        arrived: float,
        tell: Teller | None,
    ) -> tuple[Branch, Continuations]:
        """The root of the tree and what it cost, once it is grown with the weights that the request wants."""
        own, on_branch = continuations, self._first_node(arrived, tell)

        async def grow() -> Branch:
            nonlocal own
            before, version = own.counts, self.engine.version
            own = replace(continuations, counts=Counts(), watched=request.in_flight == "restart")
            own.counts.discarded = before.discarded + before.sampled + before.unfinished
            return await sample(
                request.plan,
                own,
                savings=request.savings,
                grading=grading,
                given=usable(request, version, max(version, self.status.standing.newest)),
                on_branch=on_branch,
            )

        def begun_anew() -> None:
            self.metrics.restarted.inc()
            if tell is not None:
                tell.begun_anew(self.engine.version)

        if request.in_flight == "restart":
            return await self._restarts.newest(grow, begun_anew), own
        return await grow(), own

    def _graders_of(self, request: RolloutTreeRequest) -> asyncio.Semaphore:
        """Counts the trees of the request's reward that are graded; `_checked` knows the name."""
        name = request.reward.name if request.reward else ""
        return self._graders.setdefault(name, asyncio.Semaphore(GRADED_AT_ONCE))

    def _answer(
        self,
        request: RolloutTreeRequest,
        request_id: str,
        root: Branch,
        grading: Grading,
        continuations: Continuations,
        timing: Timing,
    ) -> RolloutTreeResponse:
        """What was sampled and graded, as it goes over the wire."""
        prompt, counts = continuations.prompt, continuations.counts
        given = sum(len(node.token_ids) for node in request.given)
        tokens = self.tokens if request.return_text else None
        nodes = wire_nodes(root, prompt, grading.grades, tokens)
        versions = [v for node in nodes for v, _ in node.versions] or [self.engine.version]
        tree = RolloutTreeResponse(
            request_id=request_id,
            nodes=nodes,
            server_id=self.status.server_id,
            model=self.model,
            usage=Usage(
                prompt_tokens=len(prompt),
                sampled_tokens=counts.sampled,
                given_tokens=counts.given_tokens,
                discarded_tokens=counts.discarded + given - counts.given_tokens,
                computed_prefill_tokens=counts.computed_prefill,
                cached_tokens=counts.cached,
            ),
            weight_versions=WeightVersions(min=min(versions), max=max(versions)),
            timing=timing,
        )
        if request.reward is None:
            return tree
        return tree.with_values(chain=isinstance(request.plan, ChainPlan))

    def _first_node(self, arrived: float, tell: Teller | None) -> Callable[[Path, Branch], None]:
        """Note when the first node is there, and pass all on."""
        waiting = True

        def told(path: Path, branch: Branch) -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                self.metrics.first_node_s.observe(time.monotonic() - arrived)
            if tell is not None:
                tell.node(path, branch)

        return told

    def _count(self, tree: RolloutTreeResponse, arrived: float, counts: Counts) -> None:
        usage, metrics = tree.usage, self.metrics
        self.status.sampled_tokens += usage.sampled_tokens
        metrics.sampled.inc(usage.sampled_tokens)
        metrics.given.inc(usage.given_tokens)
        metrics.discarded.inc(counts.discarded)
        if counts.decisions:
            metrics.saved.inc()
        metrics.prefill.labels("computed").inc(usage.computed_prefill_tokens)
        metrics.prefill.labels("cached").inc(usage.cached_tokens)
        metrics.tree_s.observe(time.monotonic() - arrived)
        metrics.grading_s.observe(tree.timing.reward_s)
