"""What the scaling page computes from: measured constants, and the arithmetic on them.

Each constant says where it comes from.
"""

from dataclasses import dataclass

from tests.benchmarks.scaling_parts.swarm import Link

BYTES_PER_PARAMETER = 2
"""bfloat16, the published format."""

RATIOS = {
    "lr 1e-6": 450.0,
    "lr 1e-5": 124.0,
    "worst step": 42.0,
}
"""Full bytes over delta bytes on SmolLM2-135M (LOG.md, `tests/benchmarks/delta.py`): steps 50-52 from masters that
are not exact in bf16 (449-452, 124-125), and their first step at 1e-5, the worst. That larger models change the
same share is an assumption."""
CHANGED = {
    "lr 1e-6": 0.0043,
    "lr 1e-5": 0.0154,
    "worst step": 0.062,
}
"""Share of elements that a step changes: the same runs."""
PLANNED = "lr 1e-5"
"""The ratio that the tables use where they use one: the least favourable that is the rule."""

ENCODE = 550e6
DECODE = 630e6
"""Bytes of full weights a second on one core, hashes included: the same model at 1e-5, a chain of one (LOG.md)."""
CORES = 16
"""That encode, and that decode on each server. Tensors are independent, so that this is taken to scale."""
HASH = 1.6e9
"""Bytes a second of SHA-256 on one core of the machine that the project is built on (SHA instructions)."""

COPY = 4e9
"""Bytes a second of full weights written into a running engine: 269 MB in 60-71 ms (LOG.md, a CPU core)."""
SCATTER = 60e6
"""Changed elements a second written into a running engine: 0.4 % of 135 M in 8 ms (the same)."""
PAUSE = 0.06
"""Seconds that decoding stops for any swap, with requests running (README: 58-81 ms, CPU)."""
# Writing is taken to scale with CORES like decoding; that a GPU is no slower is an assumption.

ANCHOR_EVERY = 10

MODELS = {
    "0.5B": 0.5e9,
    "1.5B": 1.5e9,
    "7B": 7e9,
    "70B": 70e9,
    "405B": 405e9,
    "1T": 1e12,
}
FLEETS = (10, 100, 1_000, 10_000)

LINKS = (
    Link(name="data centre, 100 Gbit/s", origin_up=12.5e9, up=12.5e9, down=12.5e9, rtt=0.0002),
    Link(name="data centre, 10 Gbit/s", origin_up=1.25e9, up=1.25e9, down=1.25e9, rtt=0.0005),
    Link(
        name="internet, 1 Gbit/s", origin_up=125e6, up=125e6, down=125e6,
        rtt=0.05, loss=1e-4, slow=0.05,
    ),
    Link(
        name="internet, 100 Mbit/s up", origin_up=12.5e6, up=12.5e6, down=62.5e6,
        rtt=0.1, loss=1e-3, slow=0.05,
    ),
)  # fmt: skip
"""Round trips and losses are typical figures, not measurements; one server in twenty has a tenth of the rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of one model: bytes, and seconds of work at both ends."""

    full: float
    """Bytes of all weights."""
    size: float
    """Bytes that a server fetches."""
    encode_s: float
    verify_s: float
    """Until a server may hand its files on: their hashes."""
    decode_s: float
    """Until its engine may have them: every tensor decoded and hashed, beside what peers fetch from it."""


def anchor(parameters: float, cores: int = CORES) -> Version:
    """A version as a full copy."""
    full = parameters * BYTES_PER_PARAMETER
    hashed = full / (HASH * cores)
    return Version(
        full=full, size=full, encode_s=hashed, verify_s=hashed, decode_s=full / (HASH * cores)
    )


def delta(parameters: float, rate: str = PLANNED, cores: int = CORES) -> Version:
    """A version as what one step changed.

    >>> round(delta(7e9, "lr 1e-6").size / 1e6, 1)
    31.1
    """
    full = parameters * BYTES_PER_PARAMETER
    size = full / RATIOS[rate]
    return Version(
        full=full,
        size=size,
        encode_s=full / (ENCODE * cores),
        verify_s=size / HASH,
        decode_s=full / (DECODE * cores),
    )


def from_origin(version: Version, link: Link, servers: int) -> float:
    """Seconds until the last of `servers` has fetched a version, all of them from the one origin at once."""
    return max(
        servers * version.size / link.origin_up,
        version.size / min(link.down * (0.1 if link.slow else 1.0), link.most),
    )


def swap_s(version: Version, parameters: float, rate: str | None) -> float:
    """Seconds without sampling while an engine takes a version: all of it, or the elements that changed."""
    if rate is None:
        return PAUSE + version.full / (COPY * CORES)
    return PAUSE + parameters * CHANGED[rate] / (SCATTER * CORES)
