"""vLLM's own process dies or stands still, in a real server that follows a run while trees are asked for.

0. While vLLM loads, the server answers: alive, not ready. A stop ends it at once, and so does vLLM's death.
1. Stopped with half of a version written, and continued: nobody sees a mixture, and the newest version is taken.
2. Killed with half of a version written, or mid-tree: every request that was open is told so, the server ends with
   one line, and what is started in its place holds the newest version, tensor by tensor.
3. Stopped there for ever, or mid-tree: the same within a bound, and the stopped process is gone.

All the time a watcher compares the live tensors with those of the version that the server says it holds.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from faults.asker import BOUND_S, TREE, Asker
from faults.conftest import Run
from faults.parts import Leader, Member, until
from support import running_redis

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENGINE = ("--engine", "vllm", "--kv-cache-gib", "0.1", "--liveness-timeout", "10")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@dataclass
class Fleet:
    """One server, started again when it has ended, as a supervisor does."""

    run: Run
    leader: Leader
    member: Member

    def up(self) -> None:
        """It runs, and holds the newest version."""
        if not self.member.running:
            self.member.faults = "hasty"
            for sign in self.member.signs.iterdir():
                sign.unlink()
            self.member.start()
        self.member.go_on("load")
        self.member.wait_ready()
        self.member.wait_version(max(self.run.published))
        self.run.check(self.member)

    def mid(self, place: str) -> int:
        """A version is published, and the engine stands at a place of taking it; which process that is."""
        self.member.stand_at(place)
        self.run.publish(self.leader)
        return self.member.reached(place)

    def ends(self, *words: str) -> None:
        """The server ends by itself, with one line that has one of these words."""
        until(lambda: not self.member.running, "the server ends", BOUND_S)
        assert self.member.process.exitcode == 1
        text = self.member.log.read_text()
        lines = [line for line in text.splitlines() if "this server ends" in line]
        assert any(word in lines[-1] for word in words), lines[-1]
        assert "Traceback" not in text
        self.member.log.write_text("")


@pytest.fixture(scope="module")
def fleet(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(running_redis())
        run = Run(folder=tmp_path_factory.mktemp("run"), model=tiny_math, redis=redis, stack=stack)
        leader = run.leader("--max-staleness", "2")
        run.publish(leader)
        yield Fleet(run, leader, run.member("gpu", *ENGINE, faults="load,hasty"))


def test_a_server_answers_while_vllm_loads(fleet: Fleet) -> None:
    member = fleet.member
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=member.url, timeout=20.0) as client:  # each within these seconds

        def reached() -> bool:
            """From the first moment on, and all the while."""
            try:
                assert client.get("/livez").json() == {"status": "alive"}
                answers.append(client.get("/readyz"))
            except httpx.ReadTimeout:
                raise AssertionError("no answer while it loads") from None
            return (member.signs / "load").exists()

        until(reached, "vLLM's process is there", BOUND_S)
        assert client.post("/rollout_tree", json=TREE).status_code == 503
        assert 'spoke_state{state="loading"} 1.0' in client.get("/metrics").text
        assert alive(member.reached("load"))
        member.go_on("load")
        until(lambda: reached() and answers[-1].is_success, "it is ready", BOUND_S)
    refused = [a for a in answers if not a.is_success]
    assert len(refused) > 20
    assert {(a.status_code, a.json()["detail"]) for a in refused} == {
        (503, "this server is loading")
    }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, 2)])
def test_a_server_whose_load_is_ended_ends(run: Run, number: signal.Signals, code: int) -> None:
    """By SIGTERM of the server, or by the death of vLLM's process."""
    member = run.member("gpu", *ENGINE, faults="load")
    engine = member.reached("load", BOUND_S)
    os.kill(engine if number is signal.SIGKILL else member.process.pid, number)
    until(
        lambda: not member.running, "the server ends", 20.0
    )  # and not once it is loaded: it stands still
    assert member.process.exitcode == code
    assert not alive(engine)
    text = member.log.read_text()
    assert "Traceback" not in text
    if code:
        assert "spoke-server: vLLM did not start" in text.splitlines()[-1]


def test_vllm_stopped_for_a_while_inside_an_update_goes_on(fleet: Fleet) -> None:
    fleet.up()
    with Asker(fleet.member, fleet.run).asking() as asker:
        engine = fleet.mid("apply")
        os.kill(engine, signal.SIGSTOP)
        newest = fleet.run.publish(fleet.leader)
        seen = len(asker.lives)
        held = {live["version"] for live in asker.lives}
        assert httpx.get(f"{fleet.member.url}/readyz").json()["version"] in held  # not the new one
        fleet.member.go_on("apply")
        os.kill(engine, signal.SIGCONT)
        fleet.member.wait_version(newest)
        asker.gone_on()
        until(lambda: asker.lives[-1]["version"] == newest, "its tensors are seen", BOUND_S)
    assert len(asker.lives) > seen
    assert not asker.refused
    assert alive(engine)
    fleet.run.check(fleet.member)


def test_vllm_killed_inside_an_update_ends_the_server_and_another_catches_up(fleet: Fleet) -> None:
    fleet.up()
    with Asker(fleet.member, fleet.run).asking() as asker:
        os.kill(fleet.mid("apply"), signal.SIGKILL)
        fleet.ends("vLLM's process is gone")
    asker.told()
    fleet.up()


def test_vllm_stopped_for_ever_inside_an_update_is_given_up(fleet: Fleet) -> None:
    fleet.up()
    with Asker(fleet.member, fleet.run).asking() as asker:
        engine = fleet.mid("apply")
        os.kill(engine, signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: not fleet.member.ready(), "it is not ready any more", BOUND_S)
        fleet.ends("did not write version")
        assert time.monotonic() - stopped < BOUND_S
    assert not alive(engine)
    asker.told()
    fleet.up()


def test_vllm_killed_mid_tree_ends_the_server_and_another_takes_its_place(fleet: Fleet) -> None:
    fleet.up()
    engine = fleet.mid("apply")  # which says who the engine is
    fleet.member.go_on("apply")
    newest = max(fleet.run.published)
    fleet.member.wait_version(newest)
    with Asker(fleet.member, fleet.run).asking() as asker:
        os.kill(engine, signal.SIGKILL)
        fleet.ends("vLLM's process is gone")
    asker.told()
    fleet.up()


def test_vllm_stopped_for_ever_mid_tree_gives_no_sign_of_life(fleet: Fleet) -> None:
    """While it reads a version that it is to take, and samples."""
    fleet.up()
    with Asker(fleet.member, fleet.run).asking() as asker:
        engine = fleet.mid("stage")
        os.kill(engine, signal.SIGSTOP)
        fleet.ends("no sign of life in 10 s")
    assert not alive(engine)
    asker.told()
    fleet.up()
