"""A training run that is told to end, or that gives up: what it has learnt is kept, and nothing is left behind.

No checkpoint is made on the way here, so what is there afterwards was made at the end.
"""

import re
import signal

import pytest
from faults.conftest import Run
from faults.parts import send
from faults.test_training import QUESTIONS, STEPS, check_books, check_weights
from faults.training import Training

SOON_S = 30.0
"""Of a stop: an update and a checkpoint of the tiny model take 2 s, on a busy machine more."""


def begin(run: Run, staleness: int, *arguments: str) -> Training:
    settings = {
        "run": run.name, "model": run.model, "questions": QUESTIONS, "steps": STEPS, "staleness": staleness,
    }  # fmt: skip
    never = ("--set", "trainer.checkpoint_every=0", *arguments)
    found = Training(run.folder, run.redis.url, settings, never)
    run.stack.callback(found.end)
    found.start()
    return found


def ends(training: Training, code: int, *lines: str) -> int:
    """It ends soon, says these as its last lines, and the last step that it did is there; which one."""
    training.process.join(SOON_S)
    assert training.process.exitcode == code, training.log[-3000:]
    done = training.lines()[-1]["step"]
    assert [path.name for path in training.checkpoints()] == [f"step-{done:06d}"]
    said = training.log.splitlines()[-len(lines) - 1 :]
    assert said[0].endswith(f" step {done} is kept: `spoke train … --resume` goes on from it")
    assert said[1:] == list(lines)
    return int(done)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_goes_on_where_it_was(
    run: Run, staleness: int, number: signal.Signals
) -> None:
    one = run.member("one")
    training = begin(run, staleness)
    training.until(lambda: len(training.lines()) > 1, "two steps")
    send(training.process, number)
    done = ends(training, 130, "spoke train: stopped, as it was told to")
    assert f"{number.name}: the run stops with a checkpoint" in training.log
    training.start(resume=True)  # which the lease of the first does not keep waiting
    training.process.join(90)
    assert training.process.exitcode == 0, training.log[-3000:]
    assert f"going on after step {done}" in training.log
    assert "another trainer" not in training.log
    assert [line["step"] for line in training.lines()] == list(range(1, STEPS + 1))
    books = training.summary()["trees"]
    check_books(training.lines(), books)
    assert "trained after the checkpoint" not in books["dropped"]
    one.wait_version(training.lines()[-1]["version"])
    check_weights(training, one)


def test_a_run_without_servers_stops_as_well(run: Run) -> None:
    one = run.member("one")
    training = begin(run, 0)
    training.until(training.lines, "a step")
    one.send(signal.SIGKILL)
    training.until(lambda: "0 of 1 servers serve" in training.log, "the pause")
    send(training.process, signal.SIGTERM)
    ends(training, 130, "spoke train: stopped, as it was told to")


def test_a_run_that_gives_up_keeps_what_it_learnt(run: Run) -> None:
    one = run.member("one")
    training = begin(run, 0, "--set", "fleet.pause_s=8")
    training.until(training.lines, "a step")
    one.send(signal.SIGKILL)
    training.until(lambda: "0 of 1 servers serve" in training.log, "the pause")
    ends(
        training, 2,
        "spoke train: 0 of 1 servers serve after a pause of 8 s; start servers, then --resume, or lower "
        "fleet.min_servers",
    )  # fmt: skip


def test_a_step_that_cannot_be_published_is_kept(run: Run) -> None:
    training = without_redis(run, "--set", "fleet.pause_s=8")
    training.process.join(SOON_S)
    ends_unpublished(training, 2, training.log.splitlines()[-1])


def test_a_publication_that_waits_does_not_keep_a_run_from_stopping(run: Run) -> None:
    training = without_redis(run)
    send(training.process, signal.SIGTERM)
    ends_unpublished(training, 130, "spoke train: stopped, as it was told to")


def test_a_second_signal_ends_it_without(run: Run) -> None:
    training = without_redis(run)
    send(training.process, signal.SIGTERM)
    training.until(lambda: "SIGTERM: the run stops" in training.log, "the first signal")
    send(training.process, signal.SIGTERM)
    training.process.join(SOON_S)
    assert training.process.exitcode == 130, training.log[-3000:]
    assert training.log.splitlines()[-1] == "spoke train: interrupted"
    assert not training.checkpoints()


def without_redis(run: Run, *arguments: str) -> Training:
    """A run that has done a step, and waits with the next version, for two minutes at most."""
    run.member("one")
    training = begin(run, 0, *arguments)
    training.until(training.lines, "a step")
    run.redis.kill()
    waits = re.compile(r"version \d+ waits: ")
    training.until(lambda: waits.search(training.log), "a version that waits")
    return training


def ends_unpublished(training: Training, code: int, line: str) -> None:
    """As `ends`, in the middle of a publication."""
    done = ends(training, code, line)
    before, last = training.lines()[-2:]
    assert (last["step"], last["published"]) == (done, [])
    assert last["version"] == before["version"]
