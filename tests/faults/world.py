"""The protocol of versions as a model: two trainers (one takes over from the other), servers, Redis, a store.

Real: the servers decide by `server.states.after`, the very function that they run. Modelled, as a reading of the
code in small steps between which anything may happen: `shared/lua/*.lua` (each script a step), `trainer/lease.py`,
`trainer/publish.py`, `shared/fsspec_store.py`, and the order of work in `server/follower.py` and the engines. A
version's content is known by its author: `2B` is what trainer B published as version 2, `?` what a damaged
download gives. A pause is no step of its own: a trainer that takes none while its lease expires was paused.

Left out: time, peers (a peer serves what it verified, like the store), collection, and what a tree is made of.
"""

from dataclasses import dataclass
from typing import NamedTuple

from server.states import Standing
from tests.faults.standings import STANDINGS, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What keeps the protocol right; a test breaks one and expects the explorer to notice."""

    fenced: bool = True
    """announce.lua compares the token, and a trainer confirms its lease before the manifest."""
    bytes_first: bool = True
    looks: bool = True
    """A number that has a manifest is refused before anything is written."""
    exclusive: bool = True
    """A manifest never replaces another."""
    folders_count: bool = True
    """The next number is after every folder in the store, not only after the head."""
    verified: bool = True
    paused: bool = True
    """No token is sampled while weights are written."""
    staleness: bool = True
    knows_its_own: bool = True
    """A trainer that takes its lease again tells other trainers' versions by content, not by number."""
    restore: bool = True
    """A head that Redis lost is given back by whoever remembers it."""
    named_by_content: bool = True
    """A file never replaces one of the same number and other content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much may happen."""

    servers: int = 2
    versions: tuple[int, int] = (2, 1)
    """That trainers A and B publish."""
    max_staleness: int | None = 1
    trainer_crashes: int = 0
    expiries: int = 0
    """Of a living trainer's lease."""
    redis_restarts: int = 0
    server_crashes: int = 0
    damages: int = 0
    """Downloads that are damaged, and engines that fail half-way."""


class Trainer(NamedTuple):
    """One trainer process."""

    name: str
    left: int
    """Versions that it still publishes."""
    phase: str = "out"
    resume: str = ""
    """The phase that it goes on with, once it has its lease again."""
    token: int = 0
    number: int = 0
    ours: int = 0
    """Newest version when it took the run: whatever came before it is not of another trainer beside it."""
    base: Version | None = None
    """The version that the next one is a delta to."""
    head: Version | None = None


class Server(NamedTuple):
    """One server: what it knows, what its engine holds in its two halves, and what it is doing."""

    known: int
    """Its `Standing`, by its place in `STANDINGS`: worlds are hashed millions of times."""
    first: str = ""
    second: str = ""
    stage: str = "down"
    target: Version = (0, "")
    content: str = ""

    @property
    def standing(self) -> Standing:
        """What it knows."""
        return STANDINGS[self.known]


class World(NamedTuple):
    """Everything; the last fields are for the invariants alone."""

    trainers: tuple[Trainer, Trainer]
    servers: tuple[Server, ...]
    faults: tuple[int, int, int, int, int]
    """Still allowed, in the order of `Bounds`."""
    lease: tuple[str, int] = ("", 0)
    """Owner and token; no owner where nobody holds it."""
    tokens: int = 0
    head: Version | None = None
    folders: frozenset[int] = frozenset()
    files: frozenset[Version] = frozenset()
    manifests: frozenset[tuple[int, str, Version | None]] = frozenset()
    """Number, author, base."""
    announced: tuple[Version, ...] = ()
    """In the order in which it happened."""


def start(bounds: Bounds) -> World:
    """Nobody has started."""
    a, b = bounds.versions
    return World(
        trainers=(Trainer("A", a), Trainer("B", b)),
        servers=(Server(0),) * bounds.servers,
        faults=(
            bounds.trainer_crashes, bounds.expiries, bounds.redis_restarts, bounds.server_crashes, bounds.damages,
        ),
    )  # fmt: skip


def spend(w: World, fault: int) -> World:
    """One fault less is allowed."""
    a, b, c, d, e = (left - (place == fault) for place, left in enumerate(w.faults))
    return w._replace(faults=(a, b, c, d, e))


def restored(rules: Rules, w: World, known: Version | None) -> World:
    """restore.lua: it never lowers the head."""
    if not rules.restore or known is None or (w.head and w.head[0] >= known[0]):
        return w
    return w._replace(head=known)
