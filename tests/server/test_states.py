"""The state machine of a server: its table, row by row, and what no order of events can break.

1. The held version never goes down, and a number never stands for two sets of weights.
2. Nothing is served before the catch-up, none after the drain, none that is older than allowed.
3. An event that comes twice, late or out of order changes nothing.
"""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import states
from server.states import (
    Began,
    CaughtUp,
    Drain,
    Event,
    Failed,
    Heard,
    Phase,
    Standing,
    Took,
    after,
)
from shared.fleet import Head, ServerState


def head(version: int, digest: str = "", max_staleness: int | None = 1) -> Head:
    return Head(
        version=version,
        manifest_digest="m",
        weights_digest=digest or f"w{version}",
        store="file:///s",
        max_staleness=max_staleness,
    )


FRESH = Standing()
AT_5 = Standing(phase=Phase.FOLLOWING, version=5, digest="w5", head=head(5))
BEHIND = replace(AT_5, head=head(6))
TAKING = replace(BEHIND, taking=6)
HURT = replace(TAKING, taking=None, failure="disk full", failures=2)
DRAINING = replace(BEHIND, phase=Phase.DRAINING)


def reused(version: int) -> dict[str, object]:
    reason = f"version {version} is announced with other weights than before"
    return {"failure": f"{reason}; a version number is never used twice"}


def misfit(version: int, held: int) -> dict[str, object]:
    return {"failure": f"version {version} does not follow version {held}, which is held"}


ROWS: list[tuple[int, Standing, Event, dict[str, object]]] = [
    (1, BEHIND, Heard(head(5)), {}),
    (1, AT_5, Heard(head(4)), {}),
    (1, replace(AT_5, head=None), Heard(head(3)), {}),
    (2, BEHIND, Heard(head(6)), {}),
    (2, BEHIND, Heard(head(6, max_staleness=9)), {}),
    (3, BEHIND, Heard(head(6, "other")), reused(6)),
    (3, replace(AT_5, head=None), Heard(head(5, "other")), reused(5)),
    (4, FRESH, Heard(head(0)), {"head": head(0)}),
    (4, BEHIND, Heard(head(9)), {"head": head(9)}),
    (4, replace(AT_5, head=None), Heard(head(5)), {"head": head(5)}),
    (4, DRAINING, Heard(head(9)), {"head": head(9)}),
    (4, HURT, Heard(head(9)), {"head": head(9), "failures": 0}),
    (5, DRAINING, Began(6), {}),
    (5, AT_5, Began(5), {}),
    (5, AT_5, Began(4), {}),
    (6, BEHIND, Began(6), {"taking": 6}),
    (6, FRESH, Began(0), {"taking": 0}),
    (6, TAKING, Began(8), {"taking": 8}),
    (7, TAKING, Took(6, "w6"), {"taking": None, "version": 6, "digest": "w6"}),
    (7, HURT, Took(6, "w6"), {"version": 6, "digest": "w6", "failure": None, "failures": 0}),
    (7, FRESH, Took(0, "w0"), {"digest": "w0"}),
    (7, DRAINING, Took(6, "w6"), {"version": 6, "digest": "w6"}),
    (8, TAKING, Took(5, "w5"), {"taking": None}),
    (9, TAKING, Took(6, "other"), {"taking": None, **misfit(6, 5)}),
    (9, TAKING, Took(4, "w4"), {"taking": None, **misfit(4, 5)}),
    (9, AT_5, Took(5, "other"), {**misfit(5, 5)}),
    (9, FRESH, Took(3, ""), {**misfit(3, 0)}),
    (10, TAKING, Failed("no disk"), {"taking": None, "failure": "no disk", "failures": 1}),
    (10, HURT, Failed("no disk"), {"failure": "no disk", "failures": 3}),
    (10, replace(TAKING, head=head(7)), Failed("no disk"), {"taking": None, "failure": "no disk"}),
    (11, replace(TAKING, phase=Phase.LOADING), CaughtUp(), {"phase": Phase.FOLLOWING}),
    (12, DRAINING, CaughtUp(), {}),
    (12, AT_5, CaughtUp(), {}),
    (13, TAKING, Drain(), {"phase": Phase.DRAINING, "taking": None}),
    (13, FRESH, Drain(), {"phase": Phase.DRAINING}),
    (13, DRAINING, Drain(), {}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "before", "event", "changes"), ROWS)
def test_each_row_of_the_table(
    row: int, before: Standing, event: Event, changes: dict[str, object]
) -> None:
    assert after(before, event) == replace(before, **changes)  # type: ignore[arg-type]


def test_every_row_of_the_table_has_a_test() -> None:
    table = re.findall(r"^\| (\d+) \| (\w+)", states.__doc__ or "", re.MULTILINE)
    assert {int(row): name for row, name in table} == {
        row: type(event).__name__ for row, _, event, _ in ROWS
    }


@pytest.mark.parametrize(
    ("standing", "state"),
    [
        (FRESH, ServerState.LOADING),
        (replace(TAKING, phase=Phase.LOADING), ServerState.LOADING),
        (replace(FRESH, phase=Phase.FOLLOWING), ServerState.READY),
        (AT_5, ServerState.READY),
        (BEHIND, ServerState.READY),
        (TAKING, ServerState.UPDATING),
        (replace(TAKING, head=head(7)), ServerState.STALE),
        (replace(AT_5, head=head(7)), ServerState.STALE),
        (replace(AT_5, head=head(700, max_staleness=None)), ServerState.READY),
        (replace(AT_5, head=head(700, max_staleness=None), max_lag=3), ServerState.STALE),
        (replace(AT_5, head=head(7), max_lag=2), ServerState.READY),
        (replace(AT_5, head=head(6), max_lag=0), ServerState.STALE),
        # The checkpoint's number says nothing of its bytes.
        (Standing(phase=Phase.FOLLOWING, head=head(0)), ServerState.STALE),
        (Standing(phase=Phase.FOLLOWING, head=head(3, max_staleness=None)), ServerState.READY),
        (DRAINING, ServerState.DRAINING),
        (replace(DRAINING, head=head(9)), ServerState.DRAINING),
    ],
)
def test_the_state_is_derived(standing: Standing, state: ServerState) -> None:
    assert standing.state is state


def test_a_stale_server_says_how_far_behind_it_is() -> None:
    stale = replace(AT_5, head=head(9))
    assert "holds version 5, the run is at 9, at most 1 behind" in stale.refusal
    assert "its checkpoint" in Standing(phase=Phase.FOLLOWING, head=head(2)).refusal
    assert FRESH.refusal == "this server is loading"


VERSIONS = st.integers(0, 5)
HEADS = st.builds(
    head, VERSIONS, st.sampled_from(["", "", "other"]), st.sampled_from([None, 0, 1, 2])
)
EVENTS = st.one_of(
    st.builds(Heard, HEADS),
    st.builds(Began, VERSIONS),
    st.builds(lambda v, d: Took(v, d or f"w{v}"), VERSIONS, st.sampled_from(["", "", "other"])),
    st.builds(Failed, st.just("a reason")),
    st.just(CaughtUp()),
    st.just(Drain()),
)


@given(st.lists(EVENTS, max_size=30), st.sampled_from([None, None, 0, 2]))
def test_no_order_of_events_breaks_the_invariants(events: list[Event], max_lag: int | None) -> None:
    now = Standing(max_lag=max_lag)
    digests: dict[int, str] = {}
    for event in events:
        before, now = now, after(now, event)
        assert now.version >= before.version
        if now.digest:
            assert digests.setdefault(now.version, now.digest) == now.digest
        assert list(Phase).index(now.phase) >= list(Phase).index(before.phase)
        if before.head is not None:
            assert now.head is not None
            assert now.head.version >= before.head.version
        if now.head is not None and now.head.version == now.version and now.digest:
            assert now.head.weights_digest == now.digest
        if now.taking is not None:
            assert now.grows(now.taking)
        if now.state.serves:
            assert now.phase is Phase.FOLLOWING
            assert now.bound is None or now.lag <= now.bound
            assert now.head is None or now.bound is None or now.digest
        if not isinstance(event, Failed):  # the one event that counts
            assert after(now, event) == now


@given(st.lists(VERSIONS, min_size=1))
def test_heads_in_any_order_end_at_the_newest(versions: list[int]) -> None:
    now = Standing()
    for version in versions:
        now = after(now, Heard(head(version)))
    assert now.head == head(max(versions))
