"""What reward functions may use."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the worker processes of a reward function may use."""

    workers: int = 2
    """Processes of each function."""
    timeout_s: float = 5.0
    """Seconds of one leaf."""
    memory_bytes: int | None = 2 << 30
    """Address space of a process; None for no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What an HTTP reward may use."""

    batch: int = 64
    """Most leaves of one request."""
    connections: int = 8
    """Most requests at once, to each reward."""
    timeout_s: float = 60.0
    """Seconds of one request, from connecting to the last byte of the answer."""
    attempts: int = 5
    """How often one batch is sent at most."""
    retry_s: float = 30.0
    """No attempt begins later than this after the first one, in seconds."""
    answer_bytes: int = 1 << 20
    """Longest answer that is read."""
