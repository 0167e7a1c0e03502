"""Every error that Spoke raises on purpose.

SpokeError
├── ConfigError            what the user wrote cannot be used; the commands exit with code 2
├── RequestError           a request is malformed; HTTP 400/422 with the field named
├── BusyError              a server is full, loading, draining or stale; HTTP 429/503 with Retry-After
├── TreeError              a tree breaks its own rules (a parent after its child, a leaf without a value)
│   └── TreeTooLargeError  it is more than the reader takes
├── EngineError            the engine failed, or is dead
├── WeightsError           bytes of a version are missing, damaged or do not fit the model
│   ├── AbsentError        who was asked does not have them
│   ├── LocalError         this machine's disk, not who was asked: another source would not help
│   │   └── RoomError      the disk has no room for them
│   └── NeedsFullError     changed elements alone are of no use to the engine: it takes a full set
├── CheckpointError        a run's checkpoint cannot be written
└── CoordinationError      Redis is away, or refused
    ├── LeaseError         our lease on the run is gone, or another trainer has trained it
    │   └── LeaseHeldError another trainer holds the run
    └── FleetError         too few live servers, or they did not follow in time
        └── NoTreeError    no server gave a tree within its bound, although enough were alive
"""


class SpokeError(Exception):
    """Base of every error raised on purpose; the message names the value and the remedy."""


class ConfigError(SpokeError):
    """Configuration, argument or environment that cannot be used."""


class RequestError(SpokeError):
    """A request that cannot be served as it stands.

    Args:
        field: dotted path of the offending field, such as `plan.branch_factors`.
        detail: what is wrong and how to mend it.
        status: HTTP status, 422 unless told.
    """

    def __init__(self, field: str, detail: str, *, status: int = 422) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail
        self.status = status


class BusyError(SpokeError):
    """A server that cannot take a request now; the same request may be sent again.

    Args:
        detail: why.
        status: HTTP status: 429 full, 503 not serving.
        retry_after_s: when to come back, seconds.
    """

    def __init__(self, detail: str, *, status: int = 503, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.status = status
        self.retry_after_s = retry_after_s


class TreeError(SpokeError, ValueError):
    """A rollout tree that breaks its own rules."""


class TreeTooLargeError(TreeError):
    """A tree in more bytes than its reader takes; the message names both."""


class EngineError(SpokeError):
    """The engine failed, or is dead."""


class WeightsError(SpokeError):
    """Weights that are missing, damaged, or do not fit the model; the old ones stay in place."""


class AbsentError(WeightsError):
    """Who was asked for a version's bytes does not have them."""


class LocalError(WeightsError):
    """This machine cannot keep a version's bytes: another source would not help."""


class RoomError(LocalError):
    """The disk has no room for a version's bytes."""


class NeedsFullError(WeightsError):
    """A patch for an engine that holds other weights than the patch's base, or that takes full sets only."""


class CheckpointError(SpokeError):
    """A checkpoint that cannot be written; nothing of it is left."""


class CoordinationError(SpokeError):
    """Redis is away, or refused."""


class LeaseError(CoordinationError):
    """Our lease on the run is gone, or another trainer has trained it."""


class LeaseHeldError(LeaseError):
    """Another trainer holds the run.

    Args:
        run: its name.
        owner: who holds it.
        left_s: seconds until its lease ends unless it is renewed, by Redis' clock.
    """

    def __init__(self, run: str, owner: str, left_s: float) -> None:
        super().__init__(f"run {run!r} is being trained by {owner}; stop it, or use another --run")
        self.owner = owner
        self.left_s = left_s


class FleetError(CoordinationError):
    """Too few live servers, or they did not follow in time."""


class NoTreeError(FleetError):
    """No server gave a tree within its bound, although enough were alive."""
