"""`python -m server` that stands still at named places, so that a test can kill or stop it exactly there.

SPOKE_TEST_FAULTS names places by commas; when the server comes to one it writes a file of that name into
SPOKE_TEST_SIGNS and waits for `NAME.go` beside it. Nothing else of the server is changed.

    decode         a version is fetched, its patch is about to be made
    apply          half of a version's tensors are in the engine, the other half are not
    taken          the engine has the version, nobody has been told

    clock          the wall clock is as many seconds wrong as the file `offset` among the signs says, from one
                   moment to the next; the monotonic clock is not, as when an administrator sets the time

`second PLACE` lets the first update pass and stands in the second.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.clock import skew

PLACES = [place for place in os.environ.get("SPOKE_TEST_FAULTS", "").split(",") if place]
PASSED: list[str] = []
SAYS: dict[str, str] = {}
SIGNS = Path(os.environ.get("SPOKE_TEST_SIGNS", ""))


def stand(place: str) -> None:
    """Say that we are here, once, and wait."""
    if f"second {place}" in PLACES:
        if PASSED.count(place):
            PLACES[PLACES.index(f"second {place}")] = place
            SAYS[place] = f"second {place}"
        PASSED.append(place)
    if place not in PLACES:
        return
    PLACES.remove(place)
    place = SAYS.get(place, place)
    (SIGNS / place).touch()
    while not (SIGNS / f"{place}.go").exists():
        time.sleep(0.01)


def install() -> None:
    """Put `stand` into the server's own functions."""
    if "clock" in PLACES:
        skew(SIGNS)
    from server.engines import staging
    from server.taking import Taker

    applied = 0

    def counting(apply: Callable[[Any], None]) -> Callable[[Any], None]:
        def applied_one(change: Any) -> None:
            nonlocal applied
            apply(change)
            applied += 1
            if applied == 3:  # a few are written, most are not
                stand("apply")

        return applied_one

    for kind in (staging.Scatter, staging.Exchange):
        kind.apply = counting(kind.apply)  # type: ignore[method-assign]

    swapped, take = Taker._swapped, Taker.take

    async def slow_swapped(self: Any, *args: Any) -> Any:
        await asyncio.to_thread(stand, "decode")
        return await swapped(self, *args)

    async def slow_take(self: Any, head: Any) -> Any:
        nonlocal applied
        applied = 0
        update = await take(self, head)
        stand("taken")
        return update

    Taker._swapped = slow_swapped  # type: ignore[method-assign]
    Taker.take = slow_take  # type: ignore[method-assign]
