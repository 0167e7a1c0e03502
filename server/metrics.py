"""Prometheus metrics of one server: counters that the service raises, and gauges that are read when asked for.

Names and units are by Prometheus' conventions: base units, `_total` for counters, one meaning a name.
"""

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.rewards.pool import RewardPool
from shared.fleet import ServerState

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Bounds of histograms of time."""


class Metrics:
    """What one server counts; see the descriptions of each."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="spoke", registry=self.registry)
        seconds = partial(Histogram, namespace="spoke", registry=self.registry, buckets=SECONDS)
        self.requests = counter(
            "http_requests", "HTTP requests answered.", ["path", "method", "status"]
        )
        self.trees = counter(
            "trees",
            "Trees by how they ended: ok, repeated (the same id again), refused, busy, failed, cancelled.",
            ["outcome"],
        )
        self.sampled = counter("sampled_tokens", "Tokens sampled, of trees that ended well.")
        self.given = counter(
            "given_tokens",
            "Tokens that requests gave and nobody sampled again, of trees that ended well.",
        )
        self.discarded = counter(
            "discarded_tokens",
            "Tokens sampled here by beginnings of trees that were begun anew, of trees that ended well.",
        )
        self.restarted = counter(
            "restarted_trees", "New beginnings of trees that grew while other weights came."
        )
        self.prefill = counter(
            "prefill_tokens",
            "Prompt tokens of engine requests: computed, or reused from the prefix cache.",
            ["source"],
        )
        self.saved = counter(
            "settled_trees", "Trees that an early decision left smaller than their plan."
        )
        self.queue_s = seconds("tree_queue_seconds", "From arrival to admission.")
        self.first_node_s = seconds("tree_first_node_seconds", "From arrival to the first node.")
        self.tree_s = seconds("tree_seconds", "From arrival to the answer.")
        self.grading_s = seconds("tree_reward_seconds", "Grading after the last token.")
        self.sent_weights = counter(
            "weight_sent_bytes", "Bytes of weight files handed to other servers."
        )
        self.updates = counter("weight_updates", "Weight updates by outcome.", ["outcome"])
        self.fetched = counter(
            "weight_fetched_bytes",
            "Bytes of versions fetched: from the store, or from a peer.",
            ["source"],
        )
        self.update_s = seconds(
            "weight_update_seconds",
            "Phases of a weight update: fetch (files), decode (and verify), stage (read by the engine), pause (no "
            "token sampled), apply (of the pause).",
            ["phase"],
        )

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A gauge that is read whenever it is asked for."""
        gauge = Gauge(name, description, namespace="spoke", registry=self.registry)
        gauge.set_function(read)

    def watch_state(self, read: Callable[[], ServerState]) -> None:
        """A gauge for each state, 1 for the one that the server is in."""
        gauge = Gauge(
            "state",
            "1 for the server's state.",
            ["state"],
            namespace="spoke",
            registry=self.registry,
        )
        for state in ServerState:
            gauge.labels(state).set_function(partial(_is, read, state))

    def watch_rewards(self, rewards: RewardPool) -> None:
        """Leaves, failures and time of each reward function."""
        self.registry.register(_Rewards(rewards))

    def text(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts requests by route, method and status.

    Args:
        app: answers.
        metrics: counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count how its answer begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        def note(status: int) -> None:
            # Paths that no route knows are one: anybody may invent them.
            path = getattr(scope.get("route"), "path", "other")
            known = scope["method"] if scope["method"] in METHODS else "other"
            self._requests.labels(path, known, status).inc()

        async def noting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                note(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:  # on its way to Starlette's outermost layer, which answers 500
            if not begun:
                note(500)
            raise


def _is(read: Callable[[], ServerState], state: ServerState) -> float:
    return float(read() is state)


class _Rewards:
    """Reads the pool's own counters."""

    def __init__(self, rewards: RewardPool) -> None:
        self._rewards = rewards

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        columns = {
            "leaves": "Leaves graded.",
            "failures": "Leaves whose reward function failed: raised, ran out of time or memory, died.",
            "seconds": "Time of reward functions, as their callers waited for it.",
            "restarts": "Reward workers that had to be replaced.",
            "retries": "Batches that were sent to a reward's URL again.",
        }
        for column, description in columns.items():
            family = CounterMetricFamily(f"spoke_reward_{column}", description, labels=["reward"])
            for name, stats in self._rewards.stats.items():
                family.add_metric([name], float(getattr(stats, column)))
            yield family
