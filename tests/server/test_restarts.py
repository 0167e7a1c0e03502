"""Trees that are begun anew when the engine takes other weights; scripted growths stand in for the engine.

1. A growth that runs at a swap is ended, and begun anew; one that ended before is kept.
2. A tree that ended between the swap and the word of it has two versions: it is begun anew too.
3. New beginnings are bounded: the last growth goes on whatever comes.
4. Whoever waits and goes away takes the growth along; a growth that fails, fails.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from server.branches import Branch
from server.engines.base import Completion
from server.restarts import MOST, Restarts
from shared.tree import FinishReason

TIMEOUT = 10.0


def tree(*versions: int) -> Branch:
    root = Branch.prompt()
    for version in versions:
        done = Completion(
            token_ids=[5],
            logprobs=[-1.0],
            versions=[(version, 1)],
            finish_reason=FinishReason.STOP,
        )
        root.children.append(Branch(completion=done, response=(5,)))
    return root


class Growths:
    """Each growth waits until it is allowed to end; those that were cancelled are noted."""

    def __init__(self, ends: Callable[[int], Branch] = lambda at: tree(at)) -> None:
        self.ends = ends
        self.begun: asyncio.Queue[asyncio.Event] = asyncio.Queue()
        self.count = self.cancelled = self.anew = 0

    async def grow(self) -> Branch:
        at, may_end = self.count, asyncio.Event()
        self.count += 1
        self.begun.put_nowait(may_end)
        try:
            await may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.ends(at)

    def note(self) -> None:
        self.anew += 1

    def newest(self, restarts: Restarts) -> asyncio.Task[Branch]:
        return asyncio.create_task(restarts.newest(self.grow, self.note))


async def within(work: Awaitable[Branch]) -> Branch:
    return await asyncio.wait_for(work, TIMEOUT)


async def test_a_growth_that_runs_at_a_swap_is_begun_anew() -> None:
    restarts, growths = Restarts(), Growths()
    work = growths.newest(restarts)
    await growths.begun.get()
    assert restarts.swapped() == 1
    (await growths.begun.get()).set()
    root = await within(work)
    assert root.children[0].completion is not None
    assert root.children[0].completion.versions == [(1, 1)]
    assert (growths.count, growths.cancelled, growths.anew) == (2, 1, 1)
    assert restarts.swapped() == 0, "nothing grows any more"


async def test_a_tree_of_two_versions_is_begun_anew() -> None:
    growths = Growths(lambda at: tree(1) if at else tree(0, 1))
    work = growths.newest(Restarts())
    for _ in range(2):
        (await growths.begun.get()).set()
    assert len((await within(work)).children) == 1
    assert growths.anew == 1


async def test_weights_that_come_ever_again_keep_no_tree_from_ending() -> None:
    restarts, growths = Restarts(), Growths(lambda at: tree(at, at + 1))
    work = growths.newest(restarts)
    for _ in range(MOST):
        await growths.begun.get()
        assert restarts.swapped() == 1
    last = await growths.begun.get()
    assert restarts.swapped() == 0
    last.set()
    assert len((await within(work)).children) == 2
    assert growths.anew == MOST


async def test_who_goes_away_takes_the_growth_along() -> None:
    restarts, growths = Restarts(), Growths()
    work = growths.newest(restarts)
    await growths.begun.get()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(work)
    assert (growths.cancelled, growths.anew, restarts.swapped()) == (1, 0, 0)


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
async def test_a_growth_that_fails_by_itself_fails(error: type[BaseException]) -> None:
    def fails(at: int) -> Branch:
        raise error

    growths = Growths(fails)
    work = growths.newest(Restarts())
    (await growths.begun.get()).set()
    with pytest.raises(error):
        await within(work)
    assert growths.anew == 0
