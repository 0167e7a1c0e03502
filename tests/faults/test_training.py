"""A whole training run of `spoke train` through everything at once, synchronous and one version ahead.

1. Its trainer is killed at random moments and in the middle of a publication, Redis restarts empty, a server is
   killed and another comes: resumed, the run comes to its end.
2. Afterwards its books are right: every tree that was asked for was trained or is counted under a reason; none was
   trained twice.
3. Versions only grew, no number stood for two things, and whoever is ready holds, tensor by tensor, the weights of
   the last checkpoint.
4. With too few servers it pauses and says so, and goes on when one comes.
"""

import hashlib
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.conftest import Run
from faults.parts import Member
from faults.training import HeadWatch, Training
from safetensors.torch import load_file

QUESTIONS, STEPS = 3, 7
KILLS = 2


def begin(run: Run, staleness: int) -> Training:
    settings = {
        "run": run.name, "model": run.model, "questions": QUESTIONS, "steps": STEPS, "staleness": staleness,
    }  # fmt: skip
    found = Training(run.folder, run.redis.url, settings)
    run.stack.callback(found.end)
    return found


def paused(log: str) -> bool:
    """Does the run wait for servers? It says so once, and again when there are enough."""
    return log.rfind("0 of 1 servers serve") > log.rfind("enough servers serve")


def check_books(lines: list[dict[str, Any]], books: dict[str, Any]) -> None:
    """What the run wrote step by step against its summary."""
    ids = [name for line in lines for name in line["request_ids"]]
    assert len(ids) == len(set(ids)), "a tree was trained twice"
    final = {line["step"]: line for line in lines}
    assert sorted(final) == list(range(1, STEPS + 1))
    trained = sum(len(line["request_ids"]) for line in final.values())
    assert books["trained"] == trained
    assert books["in_flight"] == 0
    assert books["asked"] == books["trained"] + sum(books["dropped"].values())
    done_again = len(ids) - trained
    # A kill between the update and its line leaves trees that trained and whose step has no line.
    undone = books["dropped"].get("trained after the checkpoint", 0)
    assert undone - done_again in {QUESTIONS * kills for kills in range(KILLS + 1)}
    for line in final.values():  # what trained is what the step draws, each once
        assert len(line["request_ids"]) == QUESTIONS - sum(line["dropped_trees"].values())


def published(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a checkpoint, in the published dtype."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(bits).hexdigest()
    return found


def check_weights(training: Training, *members: Member) -> None:
    """Live tensors against the last checkpoint: float32 on the disk, cast here to what is published."""
    expected = published(training.checkpoints()[-1])
    assert expected != published(Path(training.settings["model"])), "nothing was learnt"
    for one in members:
        live = one.live()
        assert live["tensors"] == expected, f"{one.name} at version {live['version']}"
        assert live["live_digest"] == live["digest"]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_through_everything(run: Run, staleness: int) -> None:
    rng = random.Random(staleness)
    one, two = run.member("one"), run.member("two")
    training = begin(run, staleness)
    with HeadWatch(run.redis.url, run.name) as watch:
        training.start()
        training.until(training.checkpoints, "the first checkpoint")
        time.sleep(rng.uniform(0.0, 1.0))  # anywhere in a step
        training.kill()
        run.redis.kill()
        run.redis.start()
        training.start(resume=True)

        # A server is replaced, and the trainer killed when the files of its next version are on their way.
        done = len(training.lines())
        training.until(lambda: len(training.lines()) > done, "a step")
        one.send(signal.SIGKILL)
        three = run.member("three")
        known = training.versions()
        training.until(lambda: training.versions().keys() - known.keys(), "a publication")
        training.kill()
        training.start(resume=True)

        # Redis loses everything while the run goes on; then every server is gone.
        done = len(training.lines())
        training.until(lambda: len(training.lines()) > done, "a step")
        run.redis.kill()
        run.redis.start()
        done = len(training.lines())
        training.until(lambda: len(training.lines()) > done, "a step without what Redis knew")
        said = len(training.log)
        for gone in (two, three):
            gone.send(signal.SIGKILL)
        training.until(lambda: paused(training.log), "the pause")
        last = run.member("last")
        training.process.join(90)
    assert training.process.exitcode == 0, training.log[-3000:]
    # More than one, where a server told the new Redis of itself just before it was killed.
    assert re.search(r"enough servers serve \(\d\); going on", training.log[said:])
    watch.check()
    check_books(training.lines(), training.summary()["trees"])
    last.wait_version(watch.seen[-1][0])
    check_weights(training, last)
