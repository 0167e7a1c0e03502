"""`python -m server` that stands still at named places, so that a test can kill or stop it exactly there.

SPOKE_TEST_FAULTS names places by commas; when the server comes to one it writes a file of that name into
SPOKE_TEST_SIGNS and waits for `NAME.go` beside it. Nothing else of the server is changed.

    decode         a version is fetched, its patch is about to be made
    stage          the engine is about to read the patch
    apply          half of a version's tensors are in the engine, the other half are not
    taken          the engine has the version, nobody has been told
    load           the engine's process (vLLM's) has been forked and has done nothing yet

    hasty          no place: vLLM may take SWAP_S seconds to write a version, where it has 30

    clock          the wall clock is as many seconds wrong as the file `offset` among the signs says, from one
                   moment to the next; the monotonic clock is not, as when an administrator sets the time

`second PLACE` lets the first update pass and stands in the second. A file `PLACE.stand` among the signs names a
place too, once. A sign's content is the process that stands there: with vLLM `apply` is in the engine's.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.clock import skew

PLACES = [place for place in os.environ.get("SPOKE_TEST_FAULTS", "").split(",") if place]
SWAP_S = 10.0
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
    armed = SIGNS / f"{place}.stand"
    if place in PLACES:
        PLACES.remove(place)
    elif armed.exists():
        armed.unlink()
    else:
        return
    place = SAYS.get(place, place)
    sign = SIGNS / f"{place}.sign"
    sign.write_text(str(os.getpid()))
    sign.rename(SIGNS / place)
    parent = os.getppid()
    while not (SIGNS / f"{place}.go").exists():
        if os.getppid() != parent:
            os._exit(1)  # the server that forked us is gone, or the test is
        time.sleep(0.01)


def install() -> None:
    """Put `stand` into the server's own functions."""
    if "clock" in PLACES:
        skew(SIGNS)
    if "load" in PLACES:
        os.register_at_fork(after_in_child=lambda: stand("load"))
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

    write = staging.write

    def counted(changes: Any) -> None:
        nonlocal applied
        applied = 0
        write(changes)

    stage = staging.stage_patch

    def slow_stage(*args: Any) -> Any:
        stand("stage")
        return stage(*args)

    staging.write, staging.stage_patch = counted, slow_stage
    swapped, take = Taker._swapped, Taker.take

    async def slow_swapped(self: Any, *args: Any) -> Any:
        await asyncio.to_thread(stand, "decode")
        return await swapped(self, *args)

    async def slow_take(self: Any, head: Any) -> Any:
        if "hasty" in PLACES:
            sys.modules["server.engines.vllm_weights"].SWAP_SECONDS = SWAP_S
        update = await take(self, head)
        stand("taken")
        return update

    Taker._swapped = slow_swapped  # type: ignore[method-assign]
    Taker.take = slow_take  # type: ignore[method-assign]
