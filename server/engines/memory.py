"""How much memory this process may still take."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 62


def spare_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Bytes that can be had without swapping, by machine and container; a huge number where neither tells."""
    return min(_machine(meminfo), _container(cgroup))


def _machine(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:  # not Linux
        return _UNKNOWN
    rows = (line.split() for line in lines)
    return next((1024 * int(row[1]) for row in rows if row[0] == "MemAvailable:"), _UNKNOWN)


def _container(cgroup: Path) -> int:
    """Of a cgroup, version 2: its limit less what is in use; cached files that nobody reads can go."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such cgroup, or the limit is `max`
        return _UNKNOWN
