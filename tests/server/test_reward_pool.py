"""The pool with real processes: whatever a reward function does costs its own leaf, never the tree."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import pytest_asyncio
from support import stalls

from server.rewards import Grade, RewardPool
from server.rewards.process import Process
from shared.errors import ConfigError, RequestError

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_S = 0.5

OWN_MODULE = '''
import ctypes, hashlib, os, signal, subprocess, sys, time
from shared.errors import RequestError

HEAVY = ("torch", "vllm", "fastapi", "transformers", "uvicorn", "redis", "sympy", "httpx")
KEPT = []

class Mute(Exception):
    def __str__(self): raise KeyError("no text")

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
        case ["segfault"]: ctypes.string_at(0)
        case ["stopped"]: os.kill(os.getpid(), signal.SIGSTOP)
        case ["derive"]: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        case ["close"]: os.closerange(3, 256)
        case ["scribble"]:
            for descriptor in range(3, 64):
                try: os.write(descriptor, bytes([255]) * 64)
                except OSError: pass
        case ["print"]: print("reward: 0.5" * 1000, flush=True)
        case ["long"]: raise ValueError("x" * 50_000_000)
        case ["mute"]: raise Mute
        case ["surrogate"]: raise ValueError(chr(0xD83D))
        case ["child", log]:
            with open(log, "w") as file: file.write(str(subprocess.Popen(["sleep", "3600"]).pid))
        case ["forks"]:
            for _ in range(3): os.fork()
            time.sleep(3600)
        case ["comes_back", log]:
            if os.fork() == 0:
                with open(log, "w") as file: file.write(str(os.getpid()))
                raise ValueError("in the child")
            os.wait()
        case ["daemon", log]:
            if os.fork() == 0:
                os.setsid()
                with open(log, "w") as file: file.write(str(os.getpid()))
                time.sleep(3600)
            while not os.path.exists(log) or not open(log).read(): pass
            os._exit(5)
        case ["hang", log]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            with open(log, "w") as file: file.write(str(os.getpid()))
            while True: pass
        case ["many"]:
            small = []
            while True: small.append([None] * 64)
        case ["greedy", _]:
            small = []
            while True:
                try: small.append(bytearray(1 << 16))
                except MemoryError: time.sleep(0.01)
        case ["keep"]:
            try:
                while True: KEPT.append(bytearray(1 << 20))
            except MemoryError: pass
        case ["return", what]: return eval(what)
        case ["pause", _]: time.sleep(0.1)
        case ["heavy"]: return float(sum(name in sys.modules for name in HEAVY))
    return 1.0

def logged(response, reference, options):
    with open(options["log"], "a") as log:
        log.write(response + "\\n")
    time.sleep(options.get("pause_s", 0))
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
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                if b"server.rewards.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
    return found


def members(groups: set[int]) -> set[int]:
    """Processes that run in the process groups of these workers."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) in groups and state not in "ZX":
                found.add(int(stat.parent.name))
    return found


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


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
        ("return type('x'*10**6,(),{})()", "returned xxx"),
        ("long", "ValueError: xxx"),
        ("mute", "Mute"),
        ("surrogate", "ValueError: ?"),
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


LEFT = "left processes running; it has to wait for those that it starts"
SLOW = "took longer than its limit of 0.5 s"


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("exit 0", "its process died (exit code 0)"),
        ("exit 3", "its process died (exit code 3)"),
        ("killed", "its process died (SIGKILL)"),
        ("segfault", "its process died (SIGSEGV)"),
        ("close", "its process died (exit code 1)"),
        ("scribble", "its process wrote where only its worker may"),
        ("stubborn", SLOW),
        ("swallow", SLOW),
        ("derive", SLOW),
        ("stopped", SLOW),
        ("forks", SLOW),
        ("child {log}", LEFT),
        ("daemon {log}", "its process died (exit code 5)"),
    ],
)
async def test_a_leaf_that_costs_its_process_costs_one_and_no_other_leaf(
    pool, response, error, tmp_path
):
    """While another tree is graded, which waits for none of it."""
    log = tmp_path / "pid"
    groups, restarts = workers(), pool.stats["fault"].restarts
    response = response.format(log=log)
    bad = asyncio.create_task(pool.grade("fault", ["a", "b", response, "c", "d"], "", {}))
    worst = 0.0
    with stalls() as stalled:
        while not bad.done():
            before = time.monotonic()
            assert await pool.grade("fault", ["x", "y"], "", {}) == [GOOD, GOOD]
            worst = max(worst, time.monotonic() - before)
    first, second, failed, *others = bad.result()
    assert [first, second, *others] == [GOOD] * 4
    assert failed == Grade(reward=0.0, error=failed.error)
    assert failed.error.startswith(error)
    assert worst - stalled() < 2 * LIMIT_S
    assert await pool.grade("fault", [f"later {n}" for n in range(8)], "", {}) == [GOOD] * 8
    await until(lambda: pool.stats["fault"].restarts == restarts + 1)
    await until(lambda: len(workers()) == len(groups))
    assert len(workers() & groups) == len(groups) - 1
    await until(lambda: not members(groups - workers()))
    if response.startswith("daemon"):  # in a session of its own: out of reach, and in nobody's way
        os.kill(int(log.read_text()), signal.SIGKILL)


async def test_a_fork_that_comes_back_from_the_function_ends_there(pool, tmp_path):
    log = tmp_path / "pid"
    assert await pool.grade("fault", ["a", f"comes_back {log}", "b"], "", {}) == [GOOD] * 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


async def test_what_a_function_prints_is_no_answer(pool):
    assert await pool.grade("fault", ["print", "a"], "", {}) == [GOOD, GOOD]


async def test_memory_that_one_leaf_keeps_is_no_other_leafs_fault(own_modules):
    """Many small objects, a loop that swallows MemoryError, and memory that stays full behind an honest reward."""
    pool = RewardPool(
        {"fault": "my_rewards:fault"}, workers=1, timeout_s=3.0, memory_bytes=200 << 20
    )
    try:
        grades = await pool.grade("fault", ["a", "many", "b", "keep", "c", "greedy 1", "d"], "", {})
        good = [grades[at] for at in (0, 2, 3, 4, 6)]
        assert good == [GOOD] * 5
        assert grades[1].error.startswith("MemoryError")
        assert grades[5] == Grade(reward=0.0, error="took longer than its limit of 3 s")
        assert await pool.grade("fault", ["memory", "a"], "", {}) == [
            Grade(reward=0.0, error="MemoryError: "),
            GOOD,
        ]
    finally:
        await pool.close()


async def test_many_bad_leaves_of_several_trees_at_once(pool):
    """Each is named for what it did, wherever it stood in its batch."""
    stats = pool.stats["fault"]
    before = (stats.leaves, stats.failures, stats.restarts)
    trees = [[f"a {n}", "exit 3", f"b {n}", "killed", "raise", f"c {n}"] for n in range(4)]
    graded = await asyncio.gather(*(pool.grade("fault", tree, "", {}) for tree in trees))
    for grades in graded:
        assert [grade.error and grade.error[:28] for grade in grades] == [
            None, "its process died (exit code ", None, "its process died (SIGKILL)",
            "ValueError: on purpose xxxxx", None,
        ]  # fmt: skip
    await until(lambda: stats.restarts == before[2] + 8)
    assert (stats.leaves, stats.failures) == (before[0] + 24, before[1] + 12)
    assert stats.seconds > 0


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
    with stalls() as stalled:
        while not hanging.done():
            assert await pool.grade("fault", ["quick"], "", {}) == [GOOD]
            worst, before = max(worst, time.monotonic() - before), time.monotonic()
    assert worst - stalled() < LIMIT_S
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


async def test_a_tree_that_is_given_up_leaves_the_line(own_modules, tmp_path):
    """What it has not begun is not graded, and holds up nobody."""
    pool = RewardPool({"logged": "my_rewards:logged"}, workers=1)
    try:
        await pool.start(["logged"])
        options = {"log": str(tmp_path / "log"), "pause_s": 0.1}
        tree = [str(number) for number in range(320)]
        given_up = asyncio.create_task(pool.grade("logged", tree, "", options))
        await until((tmp_path / "log").exists)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert await pool.grade("logged", ["next"], "", options) == [GOOD]
        graded = (tmp_path / "log").read_text().split()
        assert graded[-1] == "next"
        assert len(graded) < 100  # one turn, or a few on a machine that stands still
    finally:
        await pool.close()


async def test_a_hundred_callers_that_go_away_cost_no_slot_and_no_process(own_modules):
    before = workers()
    pool = RewardPool({"fault": "my_rewards:fault"}, workers=1, timeout_s=LIMIT_S)
    try:
        await pool.start(["fault"])
        for wait in range(100):
            answers = ["pause 1", "exit 3"] if wait % 20 == 19 else [f"{wait}", "pause 1"]
            task = asyncio.create_task(pool.grade("fault", answers, "", {}))
            for _ in range(wait % 7):  # before it begins, in the line, while it is graded
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        storm = [asyncio.create_task(pool.grade("fault", [f"{n}"], "", {})) for n in range(100)]
        done, _ = await asyncio.wait(storm, return_when=asyncio.FIRST_COMPLETED)
        for task in storm:
            task.cancel()
        await asyncio.wait(storm)
        assert done
        async with asyncio.timeout(10):
            assert await pool.grade("fault", ["later", "and later"], "", {}) == [GOOD, GOOD]
        await until(lambda: pool._graders["fault"]._idle.qsize() == 1)
        assert len(workers() - before) == 1
        assert pool.stats["fault"].restarts <= 5  # what the leaves cost; no caller did
    finally:
        await pool.close()
    assert workers() <= before


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("second pair", OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
        ("child", RuntimeError("can't start new thread")),
        ("child", ZeroDivisionError("no error that is expected")),
    ],
)
async def test_a_process_that_cannot_be_started_costs_no_slot(
    own_modules, monkeypatch, fault, error
):
    """Fakes of a machine that has run out, at the call that finds out; then there is room again."""
    pool = RewardPool({"fault": "my_rewards:fault"}, workers=1, timeout_s=LIMIT_S)
    before, pairs, socketpair = workers(), [], socket.socketpair

    def pair():
        if fault == "second pair" and len(pairs) % 2:
            pairs.append(None)
            raise error
        pairs.append(socketpair())
        return pairs[-1]

    async def child(*_, **__):
        raise error

    try:
        await pool.start(["fault"])
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socketpair", pair)
            if fault == "child":
                patch.setattr(asyncio, "create_subprocess_exec", child)
            for pid in workers() - before:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: workers() <= before)
            graded = asyncio.create_task(pool.grade("fault", ["a"], "", {}))
            async with asyncio.timeout(10):
                if isinstance(error, ZeroDivisionError):
                    with pytest.raises(ZeroDivisionError):
                        await graded
                else:
                    (grade,) = await graded
                    assert str(error) in grade.error
            await until(lambda: pool._graders["fault"]._idle.qsize() == 1)
        assert pairs
        assert all(end.fileno() == -1 for both in pairs if both for end in both)
        async with asyncio.timeout(10):
            assert await pool.grade("fault", ["a"], "", {}) == [GOOD]
    finally:
        await pool.close()


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


async def test_a_question_that_passed_its_check_is_not_checked_again(own_modules, tmp_path):
    pool = RewardPool({"logged": "my_rewards:logged", "fault": "my_rewards:fault"}, workers=1)
    options = {"log": str(tmp_path / "log")}
    try:
        for reference in ("1", "1", "2", "1"):
            await pool.check("logged", reference, options)
        for _ in range(2):
            with pytest.raises(RequestError, match="not this one"):
                await pool.check("fault", "refused", {})
    finally:
        await pool.close()
    assert (tmp_path / "log").read_text() == "\n" * 2
    assert pool.stats["logged"].leaves == 0


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


async def test_a_function_that_cannot_be_loaded_at_its_first_use_is_a_503(own_modules, caplog):
    pool = RewardPool({"broken": "my_package.breaks:grade"}, workers=1)
    try:
        for _ in range(2):
            with pytest.raises(RequestError, match="cannot be loaded") as refused:
                await pool.check("broken", "", {})
            assert (refused.value.field, refused.value.status) == ("reward.name", 503)
            assert "half written" not in str(refused.value)
            assert "half written" in caplog.text
    finally:
        await pool.close()


async def test_why_a_function_cannot_be_loaded_is_known_when_its_process_is_gone(
    own_modules, monkeypatch
):
    over = Process._over

    async def late(self, *args):
        await asyncio.wait({self._watch}, timeout=10)
        return await over(self, *args)

    monkeypatch.setattr(Process, "_over", late)
    pool = RewardPool({"broken": "my_package.breaks:grade"}, workers=1)
    with pytest.raises(ConfigError, match="ValueError: half written"):
        await pool.start(["broken"])


SERVER_THAT_DIES = """
import asyncio, os, signal, sys
from server.rewards import RewardPool

async def main():
    pool = RewardPool({"fault": "my_rewards:fault"}, workers=1, timeout_s=60.0)
    await pool.start(["fault"])
    running = asyncio.create_task(pool.grade("fault", ["hang " + sys.argv[1]], "", {}))
    while not (os.path.exists(sys.argv[1]) and open(sys.argv[1]).read()):
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_worker_that_hangs_ends_with_its_server(own_modules, tmp_path):
    log = tmp_path / "pid"
    path = os.pathsep.join([str(own_modules), str(Path(__file__).parents[2])])
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER_THAT_DIES, str(log)), env=os.environ | {"PYTHONPATH": path}
    )
    assert await server.wait() == -signal.SIGKILL
    await until(lambda: not members({int(log.read_text())}))


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
