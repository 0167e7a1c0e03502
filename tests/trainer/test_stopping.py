"""A run that is told to end: what is given up, what is not, and whose signal handlers stay."""

import asyncio
import contextlib
import os
import signal

import pytest

from trainer.stopping import SIGNALS, Stop, StoppedError, terminated_as_interrupted


async def test_what_is_done_is_returned() -> None:
    assert await Stop().unless(asyncio.sleep(0, "done")) == "done"


async def test_what_went_wrong_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await Stop().unless(fails())


async def test_what_waits_is_cancelled_and_has_ended() -> None:
    stop, steps = Stop(), []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    asyncio.get_running_loop().call_later(0.01, stop.ask)
    with pytest.raises(StoppedError):
        await stop.unless(waits())
    assert steps == ["cleaned up"]


async def test_once_the_run_is_to_end_nothing_is_waited_for() -> None:
    stop, begun = Stop(), []
    stop.ask()

    async def work() -> None:
        begun.append(True)

    with pytest.raises(StoppedError):
        await stop.unless(work())
    assert not begun
    await stop.unless(work(), grace_s=1.0)
    assert begun


async def test_what_has_some_time_is_cancelled_after_it() -> None:
    stop = Stop()
    asyncio.get_running_loop().call_later(0.01, stop.ask)
    assert await stop.unless(asyncio.sleep(0.05, "done"), grace_s=60.0) == "done"
    with pytest.raises(StoppedError):
        await stop.unless(asyncio.sleep(60), grace_s=0.01)


async def test_one_who_is_cancelled_cancels_it() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(Stop().unless(waits()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_who_ignores_ctrl_c_goes_on_to() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop().listening(print):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("number", SIGNALS)
async def test_the_first_signal_asks_and_the_next_acts_as_without_us(
    number: signal.Signals,
) -> None:
    came: list[int] = []
    former = signal.signal(number, lambda got, frame: came.append(got))
    try:
        stop, said = Stop(), list[str]()
        with stop.listening(said.append):
            os.kill(os.getpid(), number)
            with pytest.raises(StoppedError):
                await stop.unless(asyncio.sleep(10))
            assert not came
            assert [line.split(":")[0] for line in said] == [number.name]
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.01)
            assert came == [number]
    finally:
        signal.signal(number, former)


async def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop().listening(print):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_sigterm_unwinds_like_ctrl_c() -> None:
    before, unwound = signal.getsignal(signal.SIGTERM), []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(10)
        finally:
            unwound.append("work")

    with contextlib.suppress(KeyboardInterrupt), terminated_as_interrupted():
        asyncio.run(work())
    assert unwound == ["work"]
    assert signal.getsignal(signal.SIGTERM) is before
