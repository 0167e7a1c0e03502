"""The pool with real processes: whatever a reward function does costs its own leaf, never the tree."""

import asyncio
import multiprocessing
import os
import signal
import sys
import time

import pytest
import pytest_asyncio

from server.rewards import Grade, RewardPool
from shared.errors import ConfigError, RequestError

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_S = 0.5

OWN_MODULE = '''
import os, signal, sys, time
from shared.errors import RequestError

HEAVY = ("torch", "vllm", "fastapi", "transformers", "uvicorn", "redis", "sympy")

def fault(response, reference, options):
    """Does what the response says; anything else is right."""
    if reference == "refused":
        raise RequestError("reward.reference", "not this one")
    match response.split():
        case ["raise"]: raise ValueError("on purpose " + "x" * 1000)
        case ["quit"]: sys.exit(4)
        case ["exit", code]: os._exit(int(code))
        case ["killed"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["loop"]:
            while True: pass
        case ["sleep"]: time.sleep(3600)
        case ["stubborn"]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            while True: pass
        case ["swallow"]:
            while True:
                try: time.sleep(3600)
                except BaseException: pass
        case ["memory"]: return float(len(bytearray(3 << 30)))
        case ["return", what]: return eval(what)
        case ["pause", _]: time.sleep(0.1)
        case ["heavy"]: return float(sum(name in sys.modules for name in HEAVY))
    return 1.0

def logged(response, reference, options):
    with open(options["log"], "a") as log:
        log.write(response + "\\n")
    return 1.0

def suffix(response, reference, options):
    return float(response.endswith(reference)) * options.get("scale", 1)
'''


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_rewards.py").write_text(OWN_MODULE)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "dies.py").write_text("import os; os._exit(7)")
    (folder / "my_package" / "breaks.py").write_text("raise ValueError('half written')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        yield folder


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool(own_modules):
    pool = RewardPool({"fault": "my_rewards:fault"}, timeout_s=LIMIT_S)
    await pool.start(["fault"])
    yield pool
    await pool.close()


def workers() -> set[int]:
    """Processes of every pool of this test session."""
    return {child.pid for child in multiprocessing.active_children()}


GOOD = Grade(reward=1.0)


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("raise", "ValueError: on purpose xxx"),
        ("quit", "SystemExit: 4"),
        ("loop", "took longer than its limit of 0.5 s"),
        ("sleep", "took longer than its limit of 0.5 s"),
        ("memory", "MemoryError: "),
        ("return float('nan')", "returned nan, not a finite number"),
        ("return float('inf')", "returned inf, not a finite number"),
        ("return None", "returned NoneType, not a finite number"),
        ("return '1.0'", "returned str, not a finite number"),
        ("return 1j", "returned complex, not a finite number"),
        ("return 10**400", "OverflowError: "),
    ],
)
async def test_a_failing_leaf_says_why_and_its_process_lives_on(pool, response, error):
    before = workers()
    first, bad, last = await pool.grade("fault", ["a", response, "b"], "", {})
    assert (first, last) == (GOOD, GOOD)
    assert bad.reward == 0.0
    assert bad.error.startswith(error)
    assert len(bad.error) <= 300
    assert before <= workers()


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("exit 3", "its process died (exit code 3)"),
        ("killed", "its process died (SIGKILL)"),
    ],
)
async def test_a_leaf_that_takes_its_process_down_costs_no_other_leaf(pool, response, error):
    grades = await pool.grade("fault", ["a", "b", response, "c", "d"], "", {})
    assert grades == [GOOD, GOOD, Grade(reward=0.0, error=error), GOOD, GOOD]
    assert await pool.grade("fault", ["later"], "", {}) == [GOOD]


async def test_what_no_alarm_can_stop_is_killed(pool):
    """A blocked alarm, a swallowed one, and a process that leaves as if its work was done."""
    leaves = ["a", "stubborn", "b", "swallow", "exit 0", "c"]
    grades = await pool.grade("fault", leaves, "", {})
    slow = Grade(reward=0.0, error="took longer than its limit of 0.5 s")
    assert grades == [GOOD, slow, GOOD, slow, slow, GOOD]


@pytest.mark.parametrize(("what", "reward"), [("True", 1.0), ("-2", -2.0), ("Fraction(1,4)", 0.25)])
async def test_any_real_number_is_a_reward(pool, what, reward):
    expression = what.replace("Fraction", "__import__('fractions').Fraction")
    assert await pool.grade("fault", [f"return {expression}"], "", {}) == [Grade(reward=reward)]


async def test_every_worker_killed_while_idle_is_replaced(pool):
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    answers = [f"answer {number}" for number in range(20)]
    assert await pool.grade("fault", answers, "", {}) == [GOOD] * 20


async def test_the_event_loop_runs_on_and_so_do_other_trees(pool):
    hanging = asyncio.create_task(pool.grade("fault", ["loop"], "", {}))
    worst, before = 0.0, time.monotonic()
    while not hanging.done():
        assert await pool.grade("fault", ["quick"], "", {}) == [GOOD]
        worst, before = max(worst, time.monotonic() - before), time.monotonic()
    assert worst < LIMIT_S
    assert hanging.result()[0].error is not None


async def test_a_client_that_goes_away_costs_no_process(pool):
    before = workers()
    task = asyncio.create_task(pool.grade("fault", ["sleep", "loop"], "", {}))
    done, _ = await asyncio.wait([task], timeout=LIMIT_S / 5)
    assert not done
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await pool.grade("fault", ["later"], "", {}) == [GOOD]
    assert before <= workers()


async def test_grades_come_in_order_across_batches_and_turns(pool):
    """100 quick leaves are several batches; 16 of a tenth of a second overrun a worker's turn several times."""
    quick = [f"return {number}" for number in range(100)]
    grades = await pool.grade("fault", quick, "", {})
    assert [grade.reward for grade in grades] == list(range(100))
    slow = [answer for n in range(8) for answer in (f"pause {n}", f"return {n + 2}")]
    grades = await pool.grade("fault", slow, "", {})
    assert [grade.reward for grade in grades] == [r for n in range(8) for r in (1, n + 2)]
    assert await pool.grade("fault", [], "", {}) == []


async def test_equal_responses_are_graded_once(own_modules, tmp_path):
    pool = RewardPool({"logged": "my_rewards:logged"}, workers=1)
    try:
        options = {"log": str(tmp_path / "log")}
        assert await pool.grade("logged", ["a", "b", "a", "a"], "", options) == [GOOD] * 4
    finally:
        await pool.close()
    assert (tmp_path / "log").read_text().splitlines() == ["a", "b"]


async def test_workers_load_none_of_the_servers_weight(pool):
    assert await pool.grade("fault", ["heavy"], "", {}) == [Grade(reward=0.0)]


async def test_a_function_may_refuse_the_request(pool):
    with pytest.raises(RequestError) as refused:
        await pool.check("fault", "refused", {})
    assert (refused.value.field, refused.value.detail) == ("reward.reference", "not this one")


async def test_check_refuses_what_could_never_be_graded(own_modules):
    pool = RewardPool(workers=1)
    try:
        await pool.check("gsm8k", "#### 72", {"unfinished": -1})
        for name, reference, options, field in [
            ("gsm8", "72", {}, "reward.name"),
            ("gsm8k", "none", {}, "reward.reference"),
            ("gsm8k", "72", {"strict": True}, "reward.options.strict"),
            ("gsm8k", "72", {"unfinished": "no"}, "reward.options.unfinished"),
            ("gsm8k", "72", {"unfinished": float("nan")}, "reward.options.unfinished"),
            ("gsm8k", "72", {"unfinished": 10**400}, "reward.options.unfinished"),
        ]:
            with pytest.raises(RequestError) as refused:
                await pool.check(name, reference, options)
            assert refused.value.field == field
    finally:
        await pool.close()


async def test_a_users_own_function_gets_reference_and_options(own_modules):
    pool = RewardPool({"suffix": "my_rewards:suffix"}, workers=1)
    try:
        assert pool.names() == ["gsm8k", "math", "suffix"]
        grades = await pool.grade("suffix", ["it is 7", "it is 8"], "7", {"scale": 0.5})
    finally:
        await pool.close()
    assert grades == [Grade(reward=0.5), Grade(reward=0.0)]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:grade", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rewards:no_such_function", "no_such_function"),
        ("my_package.breaks:grade", "ValueError: half written"),
        ("my_package.dies:grade", "its process dies while loading it"),
        ("my_rewards:HEAVY", "it is a tuple, not a function"),
    ],
)
async def test_a_function_that_cannot_be_loaded_stops_the_start(own_modules, target, message):
    before = workers()
    pool = RewardPool({"broken": target}, workers=1)
    with pytest.raises(ConfigError, match=f"reward function {target} cannot be used: ") as refused:
        await pool.start(["broken"])
    assert message in str(refused.value)
    assert workers() <= before


async def test_close_ends_every_process_and_answers_for_what_runs(own_modules):
    before = workers()
    pool = RewardPool({"fault": "my_rewards:fault"}, timeout_s=60.0)
    await pool.start()
    assert len(workers() - before) == 4  # two for gsm8k, two for fault; none for math
    running = asyncio.create_task(pool.grade("fault", ["sleep", "a", "b", "c"], "", {}))
    assert await pool.grade("fault", ["quick"], "", {}) == [GOOD]  # so the others have begun
    await pool.close()
    assert workers() <= before
    assert Grade(reward=0.0, error="the reward pool is closed") in await running
    for name in ("fault", "math"):
        late = await pool.grade(name, ["late"], "", {})
        assert late == [Grade(reward=0.0, error="the reward pool is closed")]
    await pool.close()
