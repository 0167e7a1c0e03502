"""A server from outside: its metrics, and what its processes hold, from `/proc`."""

import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import httpx

GAUGES = (
    "trees_in_flight", "trees_waiting", "nodes_in_flight", "tokens_in_flight", "requests_in_flight",
    "engine_sequences",
)  # fmt: skip
"""All of them are 0 once nobody asks for anything."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look."""

    at_s: float
    rss_mb: dict[int, float]
    """By process, the server first."""
    fds: int
    """Open files of the server itself."""
    metrics: dict[str, float]
    """By name, with labels, without `spoke_`."""

    @property
    def total_mb(self) -> float:
        """Of all processes."""
        return sum(self.rss_mb.values())

    def gauges(self) -> dict[str, float]:
        """Of what is in flight."""
        return {name: self.metrics[name] for name in GAUGES}


class Watch:
    """Looks at one server.

    Args:
        url: of the server.
        pid: of its first process.
    """

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self._pid = pid

    async def look(self, at_s: float, client: httpx.AsyncClient) -> Sample:
        """Everything, now."""
        text = (await client.get(f"{self._url}/metrics")).text
        return Sample(
            at_s=at_s,
            rss_mb={pid: rss for pid in tree_of(self._pid) if (rss := _rss_mb(pid)) > 0},
            fds=len(os.listdir(f"/proc/{self._pid}/fd")),
            metrics=metrics(text),
        )

    def cpu_s(self) -> dict[int, float]:
        """CPU time of each process."""
        return {pid: seconds for pid in tree_of(self._pid) if (seconds := _cpu_s(pid)) is not None}


def metrics(text: str) -> dict[str, float]:
    """The numbers in a page of metrics, by name and labels."""
    found = re.findall(r"^spoke_(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, at = [pid], 0
    while at < len(found):
        for children in Path(f"/proc/{found[at]}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # ended meanwhile
                continue
        at += 1
    return found


def running(pid: int) -> bool:
    """Is there such a process, which has not ended?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _rss_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 2**20
    except OSError:
        return 0.0


def _cpu_s(pid: int) -> float | None:
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(parts[11]) + int(parts[12])) / _TICKS


def slope_mb_min(samples: list[Sample], pid: int | None = None) -> float:
    """Growth of memory over the second half of some samples, MB a minute; of one process or of all."""
    half = [s for s in samples if s.at_s >= samples[-1].at_s / 2] if samples else []
    if len(half) < 3:
        return float("nan")
    values = [s.total_mb if pid is None else s.rss_mb.get(pid, 0.0) for s in half]
    return 60 * statistics.linear_regression([s.at_s for s in half], values).slope
