"""When a run makes checkpoints, how many stay, and what becomes of one that the disk refuses.

One that is due during training is left out then: a later one may find room. The last one waits, for with it goes
what the run has learnt.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shared.errors import CheckpointError
from trainer import checkpoints
from trainer.checkpoints import Progress
from trainer.config import TrainSettings
from trainer.replay import Replay
from trainer.update import Learner

RETRY_S = 10.0
"""Each try may write until the disk is full again."""


@dataclass(slots=True, kw_only=True)
class Saving:
    """The checkpoints of one run.

    Args:
        settings: of the run.
        folder: of the run.
        say: shows a line that stays.
    """

    settings: TrainSettings
    folder: Path
    say: Callable[[str], None]
    _since: float = field(default_factory=time.monotonic, init=False)
    """When the last one was made or tried; at first, when the run began."""
    _thinned: bool = field(default=False, init=False)

    def due(self, done: int) -> bool:
        """Is it time for one, after so many steps?"""
        every = self.settings.trainer.checkpoint_every
        after_s = 60 * self.settings.trainer.checkpoint_minutes
        return bool(
            (every and done % every == 0)
            or (after_s and time.monotonic() - self._since >= after_s)
        )  # fmt: skip

    def has(self, step: int) -> bool:
        """Is there a whole one of this step?"""
        return checkpoints.of(self.folder, step).exists()

    async def save(
        self, learner: Learner, replay: Replay | None, progress: Progress, *, last: bool
    ) -> None:
        """Make one, then delete old ones; the event loop goes on meanwhile.

        Args:
            learner, replay, progress: see `checkpoints.save`.
            last: no other one follows.

        Raises:
            CheckpointError: the last one cannot be written, not within `fleet.pause_s` either.
        """
        make = partial(
            checkpoints.save, self.folder, learner, self.settings.model.path, replay, progress
        )
        try:
            made = await asyncio.to_thread(make)
        except CheckpointError as error:
            if not last:
                self.say(f"{error}; training goes on without this checkpoint")
                return
            made = await self._patiently(make, error)
        finally:
            self._since = time.monotonic()
        await self._thin(made)

    async def _thin(self, made: Path) -> None:
        keep = self.settings.trainer.keep_checkpoints
        try:
            gone = await asyncio.to_thread(checkpoints.thin, made, keep)
        except OSError as error:
            self.say(f"an old checkpoint cannot be deleted: {error}; training goes on")
            return
        if gone and not self._thinned:
            self._thinned = True
            said = gone[0] if len(gone) == 1 else f"{gone[0]} to {gone[-1]}"
            self.say(
                f"{said} deleted: the newest {keep} stay (trainer.keep_checkpoints; 0 keeps all)"
            )

    async def _patiently(self, make: Callable[[], Path], error: CheckpointError) -> Path:
        pause_s = self.settings.fleet.pause_s
        deadline = time.monotonic() + pause_s
        self.say(f"{error}; the last checkpoint waits, at most {pause_s:.0f} s")
        while True:
            await asyncio.sleep(min(RETRY_S, pause_s / 10))
            try:
                return await asyncio.to_thread(make)
            except CheckpointError as again:
                if time.monotonic() > deadline:
                    found = checkpoints.whole(self.folder)
                    then = f"--resume goes on from {found[-1].name}" if found else "there is none"
                    raise CheckpointError(
                        f"{again}; given up after {pause_s:.0f} s; {then}"
                    ) from None
