"""What became of every tree that was asked for: each is trained, dropped for a reason, or still in flight.

    asked = trained + sum of dropped + in flight

A tree is one question of one step; attempts at several servers are one tree. It is on disk before it is sent: what
was in flight when a run was killed is counted once it is resumed.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

FILE = "ledger.json"
"""In a run's folder: `Ledger.as_json`, up to date."""


class Dropped(StrEnum):
    """Why a tree did not train. Refusals go by `refused: FIELD`."""

    TOO_OLD = "too old"
    """A token is older than `fleet.max_staleness` allows."""
    NO_SIGNAL = "no signal"
    """Another question took its place (`rollout.resample`)."""
    NO_SERVER = "no server gave it"
    """Within its bound, although enough were alive."""
    UNUSED = "unused at the end"
    """Rolled out ahead for a step that the run did not come to."""
    STOPPED = "in flight when the run stopped"
    UNDONE = "trained after the checkpoint"
    """In steps that the run did again once it was resumed."""


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Counts of a whole run, over resumptions. Calls that change it return once the change is on disk.

    >>> ledger = Ledger()
    >>> ledger.ask(3)
    >>> ledger.settle(1, {Dropped.TOO_OLD: 1})
    >>> ledger.in_flight
    1
    """

    asked: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    path: Path | None = None
    """File that has the same; None for none."""

    @property
    def in_flight(self) -> int:
        """Trees that were asked for and of which nothing has become yet."""
        return self.asked - self.trained - self.dropped.total()

    def ask(self, count: int) -> None:
        """Count trees that are about to be asked for."""
        if count:
            self.asked += count
            self._write()

    def settle(self, trained: int, dropped: Mapping[str, int]) -> None:
        """Count what became of a step's trees."""
        self.trained += trained
        self.dropped.update({str(reason): count for reason, count in dropped.items() if count})
        self._write()

    def end(self, reason: Dropped) -> None:
        """Nothing will become of the trees that are in flight."""
        if self.in_flight:
            self.settle(0, {reason: self.in_flight})

    def _write(self) -> None:
        """Whole or not at all, by rename."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w") as stream:
            json.dump(self.as_json(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self.path)

    def as_json(self) -> dict[str, Any]:
        """What `resumed` reads."""
        return {
            "asked": self.asked,
            "trained": self.trained,
            "in_flight": self.in_flight,
            "dropped": dict(self.dropped),
        }

    @classmethod
    def resumed(
        cls, checkpoint: dict[str, Any], newest: dict[str, Any], path: Path | None = None
    ) -> Self:
        """The ledger of a run that goes on from a checkpoint.

        Args:
            checkpoint: `as_json` of that moment.
            newest: the last that the run wrote, at the checkpoint or after it.
            path: see the class.

        >>> before = {"asked": 8, "trained": 4, "in_flight": 4, "dropped": {}}
        >>> after = {"asked": 12, "trained": 7, "in_flight": 4, "dropped": {"too old": 1}}
        >>> ledger = Ledger.resumed(before, after)
        >>> ledger.asked, ledger.trained, ledger.in_flight
        (12, 4, 0)
        >>> sorted(ledger.dropped.items())
        [('in flight when the run stopped', 4), ('too old', 1), ('trained after the checkpoint', 3)]
        """
        trained = checkpoint.get("trained", 0)
        dropped = Counter(newest.get("dropped", {}))
        dropped[str(Dropped.UNDONE)] += newest.get("trained", 0) - trained
        dropped[str(Dropped.STOPPED)] += newest.get("in_flight", 0)
        return cls(
            asked=newest.get("asked", 0),
            trained=trained,
            dropped=+dropped,  # without zeros
            path=path,
        )

    @classmethod
    def of_run(cls, folder: Path, checkpoint: dict[str, Any] | None) -> Self:
        """The ledger of a run in a folder, from its start or from a checkpoint.

        Args:
            folder: of the run; its file is not touched before the first change.
            checkpoint: `as_json` of that moment; None begins the run.
        """
        path = folder / FILE
        if checkpoint is None:
            return cls(path=path)
        newest = json.loads(path.read_text()) if path.exists() else checkpoint
        return cls.resumed(checkpoint, newest, path)
