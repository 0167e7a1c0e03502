"""The math reward through real worker processes, the only place that loads sympy; two for all cases."""

import asyncio
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import pytest_asyncio
from support import stalls

from server.rewards import Grade, RewardPool
from shared.errors import RequestError

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_S = 2.0
MEMORY = 512 << 20
CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("math_answers.jsonl").read_text().splitlines()
]
assert len({case["why"] for case in CASES}) == len(CASES), (
    "each case is there for a reason of its own"
)
OTHERS: set[int] = set()
"""Processes that ran before the pool."""
TOO_SLOW = Grade(reward=0.0, error="took longer than its limit of 2 s")
TOWER = r"\boxed{9^{9^{9^{9^9}}}}"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool():
    OTHERS.update(child.pid for child in multiprocessing.active_children())
    pool = RewardPool(workers=2, timeout_s=LIMIT_S, memory_bytes=MEMORY)
    await pool.start(["math"])
    yield pool
    await pool.close()


def workers() -> set[int]:
    """This pool's processes: in a whole session, others have theirs, with other bounds."""
    return {child.pid for child in multiprocessing.active_children()} - OTHERS


@pytest.mark.parametrize("case", CASES, ids=[case["why"] for case in CASES])
async def test_a_boxed_answer_is_compared_as_mathematics(pool, case):
    grades = await pool.grade("math", [case["response"]], case["reference"], {})
    assert grades == [Grade(reward=case["reward"])]


@pytest.mark.parametrize("reference", ["", "  ", r"\boxed{}", r"so \boxed{5", r"\boxed{$$}"])
async def test_a_reference_that_cannot_be_read_is_refused(pool, reference):
    with pytest.raises(RequestError) as refused:
        await pool.check("math", reference, {})
    assert refused.value.field == "reward.reference"


async def test_a_tower_of_powers_costs_one_worker_its_limit_and_nobody_else(pool):
    """Other leaves of its tree keep their rewards; other trees are graded at the usual speed meanwhile."""
    before = workers()
    answers = [r"\boxed{72}", TOWER, r"\boxed{\frac{144}{2}}", r"\boxed{71}"]
    began = time.monotonic()
    tree = asyncio.create_task(pool.grade("math", answers, "72", {}))
    waits = []
    with stalls() as stalled:
        while not tree.done():
            asked = time.monotonic()
            grades = await pool.grade("math", [rf"\boxed{{{len(waits)}}}"], str(len(waits)), {})
            assert grades == [Grade(reward=1.0)]
            waits.append(time.monotonic() - asked)
    took = time.monotonic() - began
    assert await tree == [Grade(reward=1.0), TOO_SLOW, Grade(reward=1.0), Grade(reward=0.0)]
    assert LIMIT_S <= took < 2 * LIMIT_S + stalled()
    assert len(waits) > 10
    assert max(waits) - stalled() < LIMIT_S / 2
    assert workers() == before


HOSTILE = {
    "a tower": TOWER,
    "an endless factorial": r"\boxed{9!!!!}",
    "a high power": r"\boxed{(x+y+z+w)^{500}}",
    "deep parentheses": rf"\boxed{{{'(' * 400}1{')' * 400}}}",
    "a million digits": rf"\boxed{{{'9' * 1_000_000}}}",
    "900 digits": rf"\boxed{{{'9' * 900}}}",
    "ten thousand open boxes": r"\boxed{" * 10_000,
    "ten thousand braces": rf"\boxed{{{'{' * 10_000}1{'}' * 10_000}}}",
    "ten thousand thoughts": "<think>" * 10_000 + "</think>" * 10_000,
}
SLOW = 4
"""The first so many may take the limit."""


async def test_hostile_answers_cost_their_limit_at_most_and_no_memory(pool):
    """Whatever they are: reward 0.0, as many processes after as before, and each below its bound.

    A process that no alarm reaches in time, as in a product of huge numbers, is replaced.
    """
    count = len(workers())
    began = time.monotonic()
    asked = (pool.grade("math", [answer], "72", {}) for answer in HOSTILE.values())
    grades = [grade for (grade,) in await asyncio.gather(*asked)]
    assert time.monotonic() - began < 2 * SLOW * LIMIT_S
    assert grades[0] == TOO_SLOW
    assert all(grade in (Grade(reward=0.0), TOO_SLOW) for grade in grades[:SLOW])
    assert grades[SLOW:] == [Grade(reward=0.0)] * (len(HOSTILE) - SLOW)
    async with asyncio.timeout(30):
        while len(workers()) != count:
            await asyncio.sleep(0.02)
    assert all(peak_memory(pid) <= MEMORY for pid in workers())
    assert await pool.grade("math", [r"\boxed{72}"], "72", {}) == [Grade(reward=1.0)]


def peak_memory(pid: int) -> int:
    """Most address space that a process ever had, bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPeak"))


async def test_what_is_longer_than_any_answer_is_not_parsed(pool):
    """It would take seconds."""
    long = "+".join(f"x_{{{i}}}" for i in range(300))
    assert await pool.grade("math", [rf"\boxed{{{long}}}"], "72", {}) == [Grade(reward=0.0)]
    with pytest.raises(RequestError, match="2289 characters; math reads at most 1000"):
        await pool.check("math", long, {})


async def test_thousands_of_open_boxes_are_read_in_linear_time(pool):
    text = r"\boxed{" * 50_000 + "72}"
    assert await pool.grade("math", [text], "72", {}) == [Grade(reward=1.0)]
