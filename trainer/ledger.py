"""What became of every tree that was asked for: each is trained, dropped for a reason, or still in flight.

    asked = trained + sum of dropped + in flight

A tree is one question of one step; attempts at several servers are one tree.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

TREES = "trees.json"
"""In a run's folder: the ledger when trees were asked for last."""


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
    """Counts of a whole run, over resumptions.

    >>> ledger = Ledger()
    >>> ledger.ask(3)
    >>> ledger.trained += 1
    >>> ledger.drop(Dropped.TOO_OLD)
    >>> ledger.in_flight
    1
    """

    asked: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    keep: Callable[[Self], None] = lambda ledger: None
    """Called before trees are asked for, so that those which a killed run had in flight are known."""

    def ask(self, count: int) -> None:
        """Count trees that are about to be asked for."""
        self.asked += count
        self.keep(self)

    @property
    def in_flight(self) -> int:
        """Trees that were asked for and of which nothing has become yet."""
        return self.asked - self.trained - self.dropped.total()

    def settle(self, trained: int, dropped: Mapping[str, int]) -> None:
        """Count what became of a step's trees."""
        self.trained += trained
        for reason, count in dropped.items():
            self.drop(reason, count)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count trees that will not train."""
        if count:
            self.dropped[str(reason)] += count

    def as_json(self) -> dict[str, Any]:
        """What `resumed` reads."""
        return {
            "asked": self.asked,
            "trained": self.trained,
            "in_flight": self.in_flight,
            "dropped": dict(self.dropped),
        }

    @classmethod
    def resumed(cls, checkpoint: dict[str, Any], newest: dict[str, Any]) -> Self:
        """The ledger of a run that goes on from a checkpoint.

        Args:
            checkpoint: `as_json` of that moment.
            newest: the last that the run wrote, at the checkpoint or after it.

        >>> before = {"asked": 8, "trained": 4, "in_flight": 4, "dropped": {}}
        >>> after = {"asked": 12, "trained": 7, "in_flight": 4, "dropped": {"too old": 1}}
        >>> ledger = Ledger.resumed(before, after)
        >>> ledger.asked, ledger.trained, ledger.in_flight
        (12, 4, 0)
        >>> sorted(ledger.dropped.items())
        [('in flight when the run stopped', 4), ('too old', 1), ('trained after the checkpoint', 3)]
        """
        if not newest:
            return cls()
        ledger = cls(
            asked=newest["asked"],
            trained=checkpoint.get("trained", 0),
            dropped=Counter(newest["dropped"]),
        )
        ledger.drop(Dropped.UNDONE, newest["trained"] - ledger.trained)
        ledger.drop(Dropped.STOPPED, newest["in_flight"])
        return ledger


def keep(folder: Path, ledger: Ledger) -> None:
    """Write what is asked for into a run's folder, whole or not at all: it may be killed before its next line."""
    partial = folder / f"{TREES}.partial"
    partial.write_text(json.dumps(ledger.as_json()))
    partial.replace(folder / TREES)


def newest_of(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    """The later of two records: the ledger of the last line of metrics, and what was kept since."""
    try:
        kept: dict[str, Any] = json.loads((folder / TREES).read_text())
    except FileNotFoundError:
        return line
    return kept if kept["asked"] > line.get("asked", 0) else line
