"""A wall clock that jumps."""

import time
from pathlib import Path


def skew(signs: Path) -> None:
    """From now on `time.time` is wrong by what the file `offset` says."""
    right, offset = time.time, signs / "offset"

    def wrong() -> float:
        return right() + (float(offset.read_text()) if offset.exists() else 0.0)

    time.time = wrong  # type: ignore[assignment]
