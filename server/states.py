"""What a server may serve, as a pure state machine: no clock, no network, no logger (DESIGN.md section 6).

A `Standing` is everything that the decision needs; `after` is the whole transition function. A version *grows* a
server's weights where its number is higher than the held one, or is the number of the checkpoint that the server
started from, whose digest nobody knows.

| row | event | when | becomes |
|---|---|---|---|
| 1 | Heard | its number is lower than the newest one known or held | unchanged: late or repeated |
| 2 | Heard | the same number and the same weights as the newest one known | unchanged: repeated |
| 3 | Heard | a known or held number with other weights | failure noted: a number is never used twice |
| 4 | Heard | any other one | `head` is the new one, of which nothing has failed yet |
| 5 | Began | the server drains, or the version does not grow its weights | unchanged |
| 6 | Began | any other one | `taking` is the version, whatever was being taken before |
| 7 | Took | the version grows the weights, and is not the head's number with other bytes | held; no failure left |
| 8 | Took | held already, the same weights | nothing is being taken |
| 9 | Took | any other one | nothing is being taken, failure noted |
| 10 | Failed | always | nothing is being taken, failure noted; counted unless a newer version is known by now |
| 11 | CaughtUp | the server loads | it follows |
| 12 | CaughtUp | it does not load | unchanged |
| 13 | Drain | always | it drains, for ever |

The `ServerState` is derived, first match: draining; loading; stale (`is_stale`); updating (something is being
taken); ready. So the held version never goes down, whatever order events come in, nothing is served before the
first catch-up, and nothing that is older than allowed.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from shared.fleet import Head, ServerState


class Phase(StrEnum):
    """Where a server is in its life; it only goes on, never back."""

    LOADING = "loading"
    """The model is loaded, or the first weights are taken."""
    FOLLOWING = "following"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a server holds, what it knows of its run, and what it does about it."""

    phase: Phase = Phase.LOADING
    version: int = 0
    """Held: the next token is sampled with it."""
    digest: str = ""
    """Of the held weights; empty for the checkpoint that the server started from."""
    head: Head | None = None
    """The newest version that it has heard of; None before the first."""
    max_lag: int | None = None
    """The server's own bound on `lag`, instead of the head's; None takes the head's."""
    taking: int | None = None
    """Version that is being fetched or applied."""
    failure: str | None = None
    """What went wrong last, until a version is taken."""
    failures: int = 0
    """Of taking the newest version known, one after the other."""

    @property
    def state(self) -> ServerState:
        """As the fleet sees it."""
        if self.phase is Phase.DRAINING:
            return ServerState.DRAINING
        if self.phase is Phase.LOADING:
            return ServerState.LOADING
        if self.is_stale:
            return ServerState.STALE
        return ServerState.READY if self.taking is None else ServerState.UPDATING

    @property
    def newest(self) -> int:
        """The newest version held or known."""
        return self.version if self.head is None else max(self.version, self.head.version)

    @property
    def lag(self) -> int:
        """Versions behind the newest one known."""
        return 0 if self.head is None else max(0, self.head.version - self.version)

    @property
    def bound(self) -> int | None:
        """The most versions that it may lag behind and serve; None is no bound."""
        if self.max_lag is not None or self.head is None:
            return self.max_lag
        return self.head.max_staleness

    @property
    def holds_head(self) -> bool:
        """Are the newest known version's very bytes held? Also where no version is known."""
        return self.head is None or not self.grows(self.head.version)

    @property
    def is_stale(self) -> bool:
        """Are the held weights too old to be served? A checkpoint is, once a run with a bound has a version."""
        if self.head is None or self.bound is None:
            return False
        # The checkpoint's number says nothing: its bytes were never compared with the run's.
        return self.lag > self.bound or self.digest == ""

    @property
    def refusal(self) -> str:
        """Why requests are refused, for people.

        >>> head = Head(version=7, manifest_digest="m", weights_digest="w", store="file:///s", max_staleness=1)
        >>> Standing(phase=Phase.FOLLOWING, version=3, digest="d", head=head).refusal
        'this server is stale: it holds version 3, the run is at 7, at most 1 behind may serve'
        """
        text = f"this server is {self.state}"
        if self.state is not ServerState.STALE or self.head is None:
            return text
        own = str(self.version) if self.digest else "its checkpoint, no version of the run"
        held = f"version {own}" if self.digest else own
        return (
            f"{text}: it holds {held}, the run is at {self.head.version}, "
            f"at most {self.bound} behind may serve"
        )

    def grows(self, version: int) -> bool:
        """Would taking a version bring the server forward?"""
        return version > self.version or (version == self.version and self.digest == "")


@dataclass(frozen=True, slots=True)
class Heard:
    """A head was read from Redis."""

    head: Head


@dataclass(frozen=True, slots=True)
class Began:
    """A version is being fetched."""

    version: int


@dataclass(frozen=True, slots=True)
class Took:
    """The engine holds a version."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A version could not be taken; the old weights are in place."""

    reason: str


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """What there was to take at the start has been taken."""


@dataclass(frozen=True, slots=True)
class Drain:
    """The server was told to stop."""


Event = Heard | Began | Took | Failed | CaughtUp | Drain


def after(standing: Standing, event: Event) -> Standing:
    """The standing after an event: total, see the table above."""
    match event:
        case Heard(head):
            return _heard(standing, head)
        case Began(version):
            if standing.phase is Phase.DRAINING or not standing.grows(version):
                return standing
            return replace(standing, taking=version)
        case Took(version, digest):
            return _took(standing, version, digest)
        case Failed(reason):
            return _failed(standing, reason)
        case CaughtUp():
            if standing.phase is not Phase.LOADING:
                return standing
            return replace(standing, phase=Phase.FOLLOWING)
        case Drain():
            return replace(standing, phase=Phase.DRAINING, taking=None)


def _heard(standing: Standing, head: Head) -> Standing:
    known = standing.head
    if head.version < max(standing.version, -1 if known is None else known.version):
        return standing
    digests = set()
    if known is not None and known.version == head.version:
        digests.add(known.weights_digest)
    if standing.version == head.version and standing.digest:
        digests.add(standing.digest)
    if digests - {head.weights_digest}:
        reason = (
            f"version {head.version} is announced with other weights than before; "
            "a version number is never used twice"
        )
        return replace(standing, failure=reason)
    if known is not None and known.version == head.version:
        return standing
    return replace(standing, head=head, failures=0)


def _took(standing: Standing, version: int, digest: str) -> Standing:
    done = replace(standing, taking=None)
    if (version, digest) == (standing.version, standing.digest):
        return done
    head = standing.head
    contradicts = (
        head is not None and head.version == version and head.weights_digest != digest
    ) or not digest
    if contradicts or not standing.grows(version):
        reason = f"version {version} does not follow version {standing.version}, which is held"
        return replace(done, failure=reason)
    return replace(done, version=version, digest=digest, failure=None, failures=0)


def _failed(standing: Standing, reason: str) -> Standing:
    head, taking = standing.head, standing.taking
    outdated = head is not None and taking is not None and taking < head.version
    failures = standing.failures if outdated else standing.failures + 1
    return replace(standing, taking=None, failure=reason, failures=failures)
