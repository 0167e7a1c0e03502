"""What the fleet's members say of themselves, and the head of a run."""

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from shared.transfer import TransferBackend


class ServerState(StrEnum):
    """Where a server is in its life (DESIGN.md section 6)."""

    LOADING = "loading"
    READY = "ready"
    UPDATING = "updating"
    """New weights are being fetched or applied; requests are still served."""
    STALE = "stale"
    """Its weights are older than allowed and the newest cannot be had; it may not serve."""
    DRAINING = "draining"
    """It finishes what it has and takes nothing new."""

    @property
    def serves(self) -> bool:
        """May a server in this state take requests?"""
        return self in (ServerState.READY, ServerState.UPDATING)


class ServerRecord(BaseModel):
    """One server's entry in the fleet table; it vanishes when the server stops renewing it.

    Servers of several versions of Spoke may be in one table: fields that this one does not know are ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    server_id: str
    instance: str = ""
    """Random, of this process: two processes under one id are told apart by it."""
    url: str
    state: ServerState
    version: int
    """Weight version that it samples with."""
    digest: str
    """Digest of those weights; empty for the checkpoint it started from."""
    model: str
    engine: str
    in_flight: int = 0
    """Trees being sampled."""
    sampled_tokens: int = 0
    """Since it started."""
    head: int = 0
    """Newest version that it has heard of."""
    needs: int | None = None
    """Lowest version whose files it is fetching now: the store keeps it, and what follows, for it."""
    transfer: TransferBackend | None = None
    """What the next version may come by, straight from the trainer; None where it cannot."""
    last_error: str | None = None
    updated_at: float
    """Unix seconds, by the server's clock; for people, never for decisions."""


class Head(BaseModel):
    """The newest announced version of a run."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=0)
    manifest_digest: str
    weights_digest: str
    store: str
    """URL of the store that holds it, as servers reach it."""
    max_staleness: int | None = None
    """Most versions that a server may lag behind this one and still take requests; None is no bound.

    Training announces one more than its own `max_staleness`: the newest version is always on its way to somebody,
    and its requests carry the exact bound as `min_weight_version`."""

    def held_by(self, record: ServerRecord) -> bool:
        """Does this server hold these very bytes under this very number?"""
        return (record.version, record.digest) == (self.version, self.weights_digest)

    def fields(self) -> dict[str, str]:
        """As the fields of a Redis hash; what is None has none."""
        return {k: str(v) for k, v in self.model_dump().items() if v is not None}

    @classmethod
    def of(cls, fields: dict[str, str]) -> Self:
        """From the fields of a Redis hash."""
        return cls.model_validate(fields)
