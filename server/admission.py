"""How much one server takes on at once: a bound on nodes and tokens in flight, a short queue, and then 429.

The engine would queue whatever it is given, and answer all of it too late. Trees are let in while their nodes and
tokens fit what the engine can work on; a few wait in line, so that the engine never idles between two; the rest
are told at once when to come back.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from server.costs import Cost
from server.engines.base import EngineInfo
from shared.errors import BusyError

SEQUENCES_A_PLACE = 8
"""Nodes in flight for each sequence that the engine runs at once: most nodes of a tree wait for their parents or
have ended, and a batch must stay full while trees start and end."""
WAIT_S = 30.0
"""Longest wait in line, seconds."""
RETRY_MOST_S = 60.0
"""Longest Retry-After, seconds."""
FORGETS = 0.1
"""Weight of the newest tree in running means."""
LEAST_SHARE = 0.02
"""Least that is charged of what a plan allows, however little trees of late came to."""


def capacity(info: EngineInfo) -> Cost:
    """What may be in flight in an engine: nodes by its batch, tokens by its memory for keys and values."""
    return Cost(nodes=SEQUENCES_A_PLACE * info.max_batch, tokens=info.kv_tokens)


@dataclass(slots=True)
class _Share:
    """What trees of one kind came to of late, of what their plans let one expect."""

    nodes: float = 1.0
    tokens: float = 1.0

    def of(self, expected: Cost) -> Cost:
        """What to charge."""
        return Cost(
            nodes=math.ceil(expected.nodes * max(self.nodes, LEAST_SHARE)),
            tokens=math.ceil(expected.tokens * max(self.tokens, LEAST_SHARE)),
        )

    def learn(self, expected: Cost, came_to: Cost) -> None:
        """Take in how one tree ended."""
        self.nodes += FORGETS * (came_to.nodes / max(expected.nodes, 1) - self.nodes)
        self.tokens += FORGETS * (came_to.tokens / max(expected.tokens, 1) - self.tokens)


@dataclass(eq=False, slots=True)
class _Waiting:
    cost: Cost
    admitted: asyncio.Future[None]


@dataclass(slots=True)
class Gate:
    """Lets trees in.

    A tree is charged by what trees of its kind came to of late, as a share of what their plans let one expect:
    responses end long before their limit, and how often a chain rolls out depends on the model. A tree that is
    larger than the whole capacity is let in alone.

    Args:
        bound: nodes and tokens in flight; as much again may wait.
        wait_s: longest wait, seconds.
    """

    bound: Cost
    wait_s: float = WAIT_S
    nodes: int = 0
    """In flight."""
    tokens: int = 0
    """In flight, as charged."""
    trees: int = 0
    """In flight."""
    _line: deque[_Waiting] = field(default_factory=deque)
    _shares: dict[str, _Share] = field(default_factory=dict)
    _seconds: float = 1.0

    @property
    def waiting(self) -> int:
        """Trees in line."""
        return len(self._line)

    @contextlib.asynccontextmanager
    async def admitted(
        self, expected: Cost, kind: str = "", prompt_tokens: int = 0
    ) -> AsyncIterator["Admitted"]:
        """Hold a place while a tree grows.

        Args:
            expected: of the tree's plan.
            kind: of trees that are alike in what they come to.
            prompt_tokens: which take up memory too, all of them.

        Raises:
            BusyError: (429) the server and its line are full.
        """
        share = self._shares.setdefault(kind, _Share())
        charged = share.of(expected)
        charged = Cost(nodes=charged.nodes, tokens=charged.tokens + prompt_tokens)
        await self._enter(charged)
        began, admitted = time.monotonic(), Admitted()
        try:
            yield admitted
            self._seconds += FORGETS * (time.monotonic() - began - self._seconds)
            if admitted.came_to is not None:
                share.learn(expected, admitted.came_to)
        finally:
            self._add(charged, -1)
            self._let_in()

    def retry_after_s(self) -> float:
        """Seconds until a place may be free, from how long trees took of late."""
        rounds = (len(self._line) + 1) / max(self.trees, 1)
        return min(RETRY_MOST_S, max(1.0, math.ceil(self._seconds * rounds)))

    async def _enter(self, charged: Cost) -> None:
        if not self._line and self._fits(charged):
            self._add(charged, 1)
            return
        if not self._may_wait(charged):
            raise BusyError("this server is full", status=429, retry_after_s=self.retry_after_s())
        waiting = _Waiting(charged, asyncio.get_running_loop().create_future())
        self._line.append(waiting)
        try:
            async with asyncio.timeout(self.wait_s):
                await waiting.admitted
        except BaseException as error:
            if waiting in self._line:
                self._line.remove(waiting)
                self._let_in()  # whoever stood behind it may fit
            elif waiting.admitted.done() and not waiting.admitted.cancelled():
                self._add(charged, -1)  # let in at the moment that its caller gave up
                self._let_in()
            if isinstance(error, TimeoutError):
                raise BusyError(
                    f"this server is full: no place within {self.wait_s:.0f} s",
                    status=429,
                    retry_after_s=self.retry_after_s(),
                ) from None
            raise

    def _may_wait(self, charged: Cost) -> bool:
        nodes = sum(w.cost.nodes for w in self._line) + charged.nodes
        tokens = sum(w.cost.tokens for w in self._line) + charged.tokens
        return not self._line or (nodes <= self.bound.nodes and tokens <= self.bound.tokens)

    def _fits(self, charged: Cost) -> bool:
        return self.trees == 0 or (
            self.nodes + charged.nodes <= self.bound.nodes
            and self.tokens + charged.tokens <= self.bound.tokens
        )

    def _let_in(self) -> None:
        """First come, first served: a small tree does not overtake a large one, which would wait for ever."""
        while self._line and self._fits(self._line[0].cost):
            waiting = self._line.popleft()
            if not waiting.admitted.done():
                self._add(waiting.cost, 1)
                waiting.admitted.set_result(None)

    def _add(self, charged: Cost, sign: int) -> None:
        self.nodes += sign * charged.nodes
        self.tokens += sign * charged.tokens
        self.trees += sign


@dataclass(slots=True)
class Admitted:
    """A place in the server."""

    came_to: Cost | None = None
    """What the tree came to, once it has ended well."""
