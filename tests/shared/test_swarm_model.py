"""The simulation behind docs/scaling.md against closed forms, where there are any, and its own promises."""

import math
from itertools import pairwise

import pytest

from tests.benchmarks import scaling
from tests.benchmarks.scaling_parts import costs, show, swarm
from tests.benchmarks.scaling_parts.swarm import Link, Setup, simulate

EVEN = Link(name="even", origin_up=1e6, up=1e6, down=1e6)
SIZE = 1e6
"""A second of a whole link."""


@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_two_slots_triple_the_holders_every_two_copies(rounds: int) -> None:
    out = simulate(Setup(servers=3**rounds - 1, size=SIZE, link=EVEN, slots=2, ask_again_s=0.0))
    assert out.share(1.0) == pytest.approx(2.0 * rounds)
    assert out.origin_bytes == 2 * rounds * SIZE


@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
def test_one_slot_doubles_the_holders_every_copy(rounds: int) -> None:
    out = simulate(Setup(servers=2**rounds - 1, size=SIZE, link=EVEN, slots=1, ask_again_s=0.0))
    assert out.share(1.0) == pytest.approx(rounds)
    assert out.origin_bytes == rounds * SIZE


def test_the_receiver_the_path_and_the_verification_bound_a_single_fetch() -> None:
    narrow = Link(name="narrow", origin_up=1e6, up=1e6, down=2.5e5)
    assert simulate(Setup(servers=1, size=SIZE, link=narrow)).share(1.0) == pytest.approx(4.0)
    lossy = Link(name="lossy", origin_up=1e6, up=1e6, down=1e6, rtt=0.1, loss=1e-2, connections=2)
    rate = 2 * 1.22 * 1460 / (0.1 * math.sqrt(1e-2))
    alone = simulate(Setup(servers=1, size=SIZE, link=lossy, ready_s=3.0)).share(1.0)
    assert alone == pytest.approx(4 * 0.1 + SIZE / rate + 3.0)


def test_who_takes_less_than_an_equal_part_leaves_the_rest() -> None:
    """Of two fetches at once one can take a tenth: the other has the rest of the uplink."""
    link = Link(name="mixed", origin_up=1e6, up=0.0, down=9e5, slow=0.5)
    for seed in range(20):
        out = simulate(Setup(servers=2, size=SIZE, link=link, seed=seed))
        times = [SIZE / 9e4 if pace == 0.1 else SIZE / 9e5 for pace in swarm.Swarm(
            Setup(servers=2, size=SIZE, link=link, seed=seed)).pace]  # fmt: skip
        if sorted(times)[0] != sorted(times)[1]:
            assert out.arrivals == pytest.approx(sorted(times))
            return
    raise AssertionError("no seed gave one slow and one quick server")


@pytest.mark.parametrize("failing", [0.0, 0.1, 0.5])
def test_nobody_is_lost_unreported_whoever_dies(failing: float) -> None:
    out = simulate(Setup(servers=500, size=SIZE, link=EVEN, failing=failing, seed=3))
    assert len(out.arrivals) + out.lost == 500
    assert (out.lost > 0) == (failing > 0)


def test_a_late_joiner_leaves_the_origin_alone_where_peers_hold_the_version() -> None:
    out = simulate(Setup(servers=50, holders=49, size=SIZE, link=EVEN))
    assert len(out.arrivals) == 1
    assert out.origin_bytes <= SIZE


def test_bytes_out_of_the_origin_grow_with_the_logarithm_of_the_fleet() -> None:
    copies = [
        simulate(Setup(servers=n, size=SIZE, link=EVEN)).origin_bytes / SIZE
        for n in (10, 100, 1_000, 10_000)
    ]
    steps = [after - before for before, after in pairwise(copies)]
    assert max(steps) <= 6
    assert copies[-1] <= 20


def test_every_table_has_a_place_in_the_page() -> None:
    text = (scaling.ROOT / "docs" / "scaling.md").read_text()
    links = range(len(costs.LINKS))
    names = [f"{kind}-{i}" for i in links for kind in ("delta", "anchor")]
    for name in (*names, "bytes", "shares", "uplink", "slots", "asking", "slow", "failures",
                 "joiners", "shards", "nccl", "control"):  # fmt: skip
        assert text.count(f"<!-- {name} -->") == 1, name
    assert show.markdown(scaling.bytes_table()) in text, "tests/benchmarks/scaling.py --page"
