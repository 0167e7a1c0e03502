"""A failure that lasts is said when it begins, and then once in a while: a log must stay readable for days."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

AGAIN_S = 300.0
"""How long nothing is said of a failure that goes on, seconds."""
_NUMBERS = re.compile(r"[0-9a-f]*\d[0-9a-f]*")


@dataclass(slots=True)
class Repeats:
    """Remembers the failure that was said last.

    Args:
        clock: seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _said: str = ""
    _again_at: float = 0.0
    _unsaid: int = 0

    def line(self, text: str) -> str | None:
        """What the log is to say of a failure; None for nothing.

        The same with other numbers, of versions, files and hosts, is the same.

        >>> failures = Repeats()
        >>> failures.line("version 7: no room"), failures.line("version 8: no room")
        ('version 7: no room', None)
        >>> failures.line("version 8: nobody has it")
        'version 8: nobody has it'
        """
        same, now = _NUMBERS.sub("#", text), self.clock()
        if same == self._said and now < self._again_at:
            self._unsaid += 1
            return None
        before = (
            f" ({self._unsaid} times more since it was said last)" if same == self._said else ""
        )
        self._said, self._again_at, self._unsaid = same, now + AGAIN_S, 0
        return text + before

    def over(self) -> None:
        """It worked: the next failure is a new one."""
        self._said = ""
