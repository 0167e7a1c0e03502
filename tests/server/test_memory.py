"""What a server keeps does not grow with the versions that it has served.

1. The follower, its holdings and the store: objects, mapped files and open files are as many after 20 versions.
2. Keys and values of old weights go at once, and not with the garbage collector, a hundred versions later.
3. What a swap had staged, a second set of all weights, goes as soon as the swap is over.
"""

import asyncio
import contextlib
import gc
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engines import transformers as transformers_engine
from server.engines.base import Weights
from server.engines.prefixes import PrefixStore
from server.engines.settings import EngineSettings
from server.engines.staging import Exchange
from server.engines.transformers import open_engine
from tests.server.test_follower import Member
from tests.server.weight_run import TIMEOUT, Run

EVERY = 5
"""Versions from one anchor to the next: the server is in the same place after so many."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def kept(folder: Path) -> Counter[str]:
    """Objects of our own classes that are alive, and what is held of files, by name."""
    gc.collect()
    names = (f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    found = Counter(name for name in names if name.startswith(("server.", "shared.", "mmap.")))
    maps = Path("/proc/self/maps").read_text().splitlines()
    found["mapped files"] = sum(str(folder) in line for line in maps)
    found["open files"] = sum(not link.startswith("socket:") for link in opened())
    found["files"] = sum(1 for path in folder.rglob("*") if path.is_file())
    return found


def opened() -> Iterator[str]:
    """What the open descriptors stand for. Redis' pool may open another connection at any time."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            yield os.readlink(f"/proc/self/fd/{descriptor}")


async def at_rest(member: Member) -> None:
    """Wait until nothing is left to tidy up."""
    taker: Any = member.follower.taker
    async with asyncio.timeout(TIMEOUT):
        while taker._chain is not None or any(
            thread.name == "spoke-work" for thread in threading.enumerate()
        ):
            await asyncio.sleep(0.01)


async def test_twenty_versions_leave_what_ten_had_left(tmp_path: Path, redis_url: str) -> None:
    run, folder = Run(tmp_path, redis_url), tmp_path / "server"
    async with AsyncExitStack() as stack:
        stack.push_async_callback(run.coordinator.close)
        member = Member(run, folder, stack)
        await run.publish()
        await member.start()
        seen = []
        for version in range(1, 4 * EVERY + 1):
            await run.publish(anchor=version % EVERY == 0)
            await member.holds(version)
            if version % (2 * EVERY) == 0:
                await at_rest(member)
                member.engine.loads.clear()  # the fake's own notes
                seen.append(kept(folder))
    assert seen[1] - seen[0] == Counter()


def test_cleared_prefixes_are_freed_at_once(no_collector: None) -> None:
    store, freed = PrefixStore(10**9), 0

    def read(start: int, stop: int) -> torch.Tensor:
        def count() -> None:
            nonlocal freed
            freed += 1

        states = torch.zeros(1, 2, 1, stop - start, 1)
        weakref.finalize(states, count)
        return states

    for path in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 6], [7]):
        store.put(path, read)
    assert freed == 0
    store.clear()
    assert freed == 4
    assert (store.nbytes, store.match([1, 2])) == (0, [])


async def test_what_was_staged_goes_with_the_swap(
    tiny_math: Path, monkeypatch: pytest.MonkeyPatch, no_collector: None
) -> None:
    gone: list[threading.Event] = []

    def staged(*args: Any) -> Any:
        changes = stage_full(*args)
        for change in changes:
            assert isinstance(change, Exchange)
            gone.append(threading.Event())
            weakref.finalize(change.buffer, gone[-1].set)
        return changes

    stage_full = transformers_engine.stage_full
    monkeypatch.setattr(transformers_engine, "stage_full", staged)
    engine = await open_engine(
        EngineSettings(model=str(tiny_math), dtype="float32", device="cpu", kv_cache_gib=0.1)
    )
    try:
        await engine.load_weights(
            Weights(version=1, digest="1", files=(tiny_math / "model.safetensors",))
        )
        # Nothing else is asked of the engine, which sleeps.
        assert gone
        for event in gone:
            assert await asyncio.to_thread(event.wait, 10), "the engine's thread holds on to it"
    finally:
        await engine.close()
