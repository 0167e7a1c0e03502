"""The HTTP face: routes, and what stands before them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from server.auth import TokenTable, caller
from server.body import BodyLimit, StrictRoute
from server.connection import while_connected
from server.costs import Cost
from server.details import for_caller
from server.guard import Guard
from server.holdings import Holdings
from server.limits import Limits
from server.live import Live, LiveWeights
from server.liveness import Pulse
from server.metrics import Counted, Metrics
from server.openai_routes import MISSING, add_openai_routes
from server.openapi import REQUEST_EXAMPLES, document, refusals
from server.problems import add_error_handlers
from server.respond import CONTENT, tree_response
from server.sending import SendLimit
from server.service import RolloutService
from server.status import Status
from server.streaming import node_stream
from server.transfer_routes import add_transfer_routes
from server.weights_routes import add_weights_routes
from shared.codec import MediaType, choose
from shared.errors import BusyError, RequestError
from shared.wire import RolloutTreeRequest, RolloutTreeResponse

LOGPROBS = (
    "log-probability (nats) of each token under the distribution it was sampled from: after temperature, "
    "renormalised where top_p or top_k truncates it; at temperature 0 that of temperature 1"
)


class Holder:
    """What the routes reach: the status from the start, the service once the model is loaded.

    Args:
        status: of the server.
        liveness_s: longest wait for the engine's sign of life, seconds.
    """

    def __init__(self, status: Status, *, liveness_s: float = 30.0) -> None:
        self.status = status
        self.pulse = Pulse(liveness_s)
        self.metrics = Metrics()
        self.service: RolloutService | None = None
        self.holdings: Holdings | None = None
        """Weight versions on this server's disk, for its peers; None where it follows no run, or not yet."""
        self.openai: ASGIApp | None = None
        """The engine's OpenAI routes; None where it has none."""
        self.live: Live | None = None
        """Hashes the weights; None before the model is loaded."""
        self.metrics.watch("tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
        self.metrics.watch(
            "requests_in_flight", "Requests being answered.", lambda: status.in_flight
        )
        self.metrics.watch_state(lambda: status.state)

    def watch(self, service: RolloutService) -> None:
        """Read a service's gauges at every scrape, from before it serves."""
        gate, status, watch = service.gate, self.status, self.metrics.watch
        self.live = Live(service.engine, status)
        self.metrics.watch_rewards(service.rewards)
        watch("trees_in_flight", "Trees that hold a place.", lambda: gate.trees)
        watch("trees_waiting", "Trees in line for a place.", lambda: gate.waiting)
        watch("nodes_in_flight", "Nodes of the trees that hold a place.", lambda: gate.nodes)
        watch("tokens_in_flight", "Their tokens, as expected.", lambda: gate.tokens)
        watch(
            "engine_sequences",
            "Sequences that run or wait in the engine.",
            lambda: service.engine.open_sequences,
        )
        watch("weight_version", "Weight version being sampled.", lambda: service.engine.version)
        watch("weight_lag", "Versions behind the newest known.", lambda: status.standing.lag)


def create_app(
    holder: Holder,
    *,
    tokens: TokenTable | None = None,
    limits: Limits | None = None,
    transfers: bool = False,
) -> FastAPI:
    """The application around one server's holder.

    Args:
        holder: what the routes reach.
        tokens: that requests must bring; None asks for none.
        limits: of a request; None for the usual ones.
        transfers: weights may come by broadcast.
    """
    limits = limits or Limits()
    app = FastAPI(title="Spoke rollout server", version="0.1.0", docs_url="/docs", redoc_url=None)
    app.router.route_class = StrictRoute
    _add_routes(app, holder, limits)
    if transfers:
        add_transfer_routes(app, holder)
    add_error_handlers(app)
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Guard, tokens=tokens)
    app.add_middleware(Counted, metrics=holder.metrics)
    app.add_middleware(SendLimit, bound_s=limits.send_s)  # the last one added is met first
    app.openapi = lambda: document(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _add_routes(app: FastAPI, holder: Holder, limits: Limits) -> None:
    status = holder.status

    def service() -> RolloutService:
        status.check()
        return loaded()

    def loaded() -> RolloutService:
        if holder.service is None:
            raise BusyError(status.standing.refusal)
        return holder.service

    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": RolloutTreeResponse, "content": CONTENT}
    }
    refused = refusals(406, 409, 413, 415, 422, 429, 503)

    @app.post("/rollout_tree", response_class=Response, responses=refused | answers)
    async def rollout_tree(
        body: Annotated[RolloutTreeRequest, Body(openapi_examples=REQUEST_EXAMPLES)],
        request: Request,
    ) -> Response:
        """Sample one tree of continuations, grade its leaves and back their values up."""
        request.state.request_id = body.request_id
        limits.check(body)
        accept, encoding = (
            ", ".join(request.headers.getlist(name)) for name in ("accept", "accept-encoding")
        )
        media = choose(accept)  # refused before anything is sampled
        with status.answering():
            if media is MediaType.NDJSON:
                return await node_stream(request, service(), body)
            tree = await while_connected(
                request, service().rollout_tree(body, caller=caller(request))
            )
            return await tree_response(for_caller(request, tree), media, encoding)

    @app.get("/livez", responses=refusals(503))
    async def livez() -> dict[str, str]:
        """The process answers, and so does the engine once it is loaded."""
        if holder.service is not None:
            await holder.pulse.feel(holder.service.engine)
        return {"status": "alive"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(holder.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/readyz", responses=refusals(503))
    async def readyz() -> dict[str, Any]:
        """The model is loaded and its weights may be served."""
        service()
        return {"status": status.state, **_weights(status)}

    @app.get("/info", responses=refusals(503))
    async def info() -> dict[str, Any]:
        """Model, engine, limits, weight version and logprob convention."""
        return _about(loaded(), limits)

    @app.get("/weights/live", responses=refusals(503))
    async def live_weights(request: Request) -> LiveWeights:
        """SHA-256 of every tensor that is sampled with, hashed now where it stands in the engine's memory.

        It costs a pass over all weights, which sampling may wait for; one caller is answered at a time.
        """
        loaded()
        assert holder.live is not None, "the service is watched before it serves"
        return await while_connected(request, holder.live.weights())

    add_weights_routes(app, lambda: holder.holdings, holder.metrics.sent_weights)
    _add_openai(app, holder, service)


def _about(service: RolloutService, limits: Limits) -> dict[str, Any]:
    """What `/info` says."""
    status, about = service.status, service.engine.info
    return {
        "server_id": status.server_id,
        "state": status.state,
        "model": about.model,
        "engine": about.engine,
        "dtype": about.dtype,
        "device": about.device,
        "vocab_size": about.vocab_size,
        "eos_token_ids": list(about.eos_token_ids),
        "limits": {
            **asdict(limits),
            "max_model_len": about.max_model_len,
            "max_batch": about.max_batch,
            "kv_tokens": about.kv_tokens,
            "nodes_in_flight": service.gate.bound.nodes,
            "tokens_in_flight": service.gate.bound.tokens,
            "tree_nodes": service.budget.nodes,
            "tree_tokens": service.budget.tokens,
        },
        "weights": {
            **_weights(status),
            "digest": status.weights_digest,
            "failure": status.standing.failure,
            "last_update": status.update and asdict(status.update),
        },
        "rewards": service.rewards.names(),
        "logprobs": LOGPROBS,
    }


def _weights(status: Status) -> dict[str, Any]:
    """Which version is held, and how far it is behind the newest that is known."""
    standing = status.standing
    return {
        "version": standing.version,
        "head": standing.head and standing.head.version,
        "lag": standing.lag,
        "max_staleness": standing.bound,
    }


def _add_openai(app: FastAPI, holder: Holder, service: Callable[[], RolloutService]) -> None:
    """The engine's OpenAI routes: under the same gate and budget as trees, and counted as they are."""

    def target() -> tuple[ASGIApp, int]:
        context = service().engine.info.max_model_len
        if holder.openai is None:
            raise HTTPException(404, MISSING)
        return holder.openai, context

    @contextlib.asynccontextmanager
    async def enter(cost: Cost) -> AsyncIterator[None]:
        budget, gate = service().budget, service().gate
        if not cost.within(budget):
            raise RequestError(
                "n",
                f"up to {cost.nodes:,} samples and {cost.tokens:,} tokens are over this server's budget of "
                f"{budget.nodes:,} and {budget.tokens:,}; ask for fewer prompts or samples, or a lower max_tokens",
                status=413,
            )
        with holder.status.answering():
            async with gate.admitted(cost) if cost.nodes else contextlib.nullcontext():
                yield

    add_openai_routes(app, target, enter)
