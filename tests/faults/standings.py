"""What the model's servers know, by the real state machine; numbered, since worlds are hashed so often."""

from dataclasses import replace
from functools import cache

from server.states import CaughtUp, Event, Heard, Standing, after
from shared.fleet import Head

Version = tuple[int, str]
"""Number and author."""


def name(version: Version) -> str:
    """As content: number and author."""
    return f"{version[0]}{version[1]}"


STANDINGS = [Standing()]
"""Every standing that a server was ever in; the first is that of a server that starts."""
PLACES = {Standing(): 0}


@cache
def stand(known: int, event: Event) -> int:
    """The real transition, without what is only for people."""
    then = replace(after(STANDINGS[known], event), failure=None, failures=0)
    if then not in PLACES:
        PLACES[then] = len(STANDINGS)
        STANDINGS.append(then)
    return PLACES[then]


@cache
def hear(known: int, version: Version, max_staleness: int | None) -> int:
    """A head as a server reads it."""
    digest = name(version)
    head = Head(
        version=version[0],
        manifest_digest=digest,
        weights_digest=digest,
        store="file:///s",
        max_staleness=max_staleness,
    )
    return stand(known, Heard(head))


@cache
def head_of(known: int) -> Version | None:
    """The newest version that it has heard of."""
    head = STANDINGS[known].head
    return (head.version, head.weights_digest[-1]) if head else None


@cache
def caught_up(known: int) -> int:
    """A server that loads serves once it holds what it knows of; see `Follower.catch_up`."""
    standing = STANDINGS[known]
    return known if standing.is_stale or not standing.holds_head else stand(known, CaughtUp())


@cache
def may_serve(known: int) -> bool:
    """Does the real state say that requests are taken?"""
    return STANDINGS[known].state.serves
