"""Waits of the trainer against scripted fleet tables: whom it waits for, what it says, and when it gives up."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from shared.coordination import RedisCoordinator
from shared.errors import CoordinationError, FleetError, LeaseError
from shared.fleet import Head, ServerRecord, ServerState
from trainer.fleet import registered
from trainer.patience import Patience

HEAD = Head(version=2, manifest_digest="m", weights_digest="w", store="s")


def record(
    name: str, version: int = 2, state: ServerState = ServerState.READY, error: str | None = None
) -> ServerRecord:
    return ServerRecord(
        server_id=name, url=f"http://{name}", state=state, version=version,
        digest="w" if version == 2 else "x", model="m", engine="e", last_error=error, updated_at=0.0,
    )  # fmt: skip


class FakeTable:
    """Scripted fleet tables, one a call; the last one stays. An error is raised."""

    def __init__(self, *tables: Sequence[ServerRecord] | Exception) -> None:
        self.tables = list(tables)
        self.calls = 0

    async def servers(self) -> list[ServerRecord]:
        self.calls += 1
        table = self.tables.pop(0) if len(self.tables) > 1 else self.tables[0]
        if isinstance(table, Exception):
            raise table
        return list(table)


def patience(
    *tables: Sequence[ServerRecord] | Exception,
    min_servers: int = 1,
    wait_s: float = 5.0,
    pause_s: float = 5.0,
) -> tuple[Patience, list[str]]:
    said: list[str] = []
    return (
        Patience(
            servers=FakeTable(*tables).servers,
            min_servers=min_servers,
            wait_s=wait_s,
            pause_s=pause_s,
            tell=said.append,
        ),
        said,
    )


AWAY = CoordinationError("Redis at redis://r does not answer: refused")
AWAY.__cause__ = ConnectionError("refused")


async def test_below_min_servers_it_pauses_says_so_once_and_goes_on() -> None:
    both = [record("a"), record("b")]
    waiting, said = patience([record("a")], [record("a")], both, min_servers=2)
    assert [r.server_id for r in await waiting.followed(HEAD)] == ["a", "b"]
    assert said == [
        "1 of 2 servers serve; waiting, at most 5 s",
        "enough servers serve (2); going on",
    ]


async def test_a_pause_is_not_counted_against_those_that_come_back() -> None:
    """They have `wait_s` from when they are back, however long the pause was."""
    late = [record("a", 1), record("b", 1)]
    waiting, _ = patience(
        *[[record("a", 1)]] * 4, late, [record("a"), record("b")], min_servers=2, wait_s=0.3
    )
    assert len(await waiting.followed(HEAD)) == 2


@pytest.mark.parametrize("state", [ServerState.STALE, ServerState.LOADING, ServerState.DRAINING])
async def test_who_does_not_serve_is_not_waited_for(state: ServerState) -> None:
    waiting, said = patience([record("a"), record("b", 1, state)])
    async with asyncio.timeout(1):
        assert [r.server_id for r in await waiting.followed(HEAD)] == ["a"]
    assert said == []


async def test_those_that_take_their_first_version_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.patience.QUIET_S", 0.0)
    new = [record("a", 0, ServerState.STALE), record("b", 0, ServerState.LOADING)]
    waiting, said = patience(new, [record("a"), record("b")])
    await waiting.followed(HEAD)
    assert said[0] == "0 of 1 servers serve (a stale; b loading); waiting, at most 5 s"


async def test_who_came_and_who_went_is_told_once() -> None:
    waiting, said = patience([record("a"), record("b")])
    await waiting.followed(HEAD)
    await waiting.followed(HEAD)
    assert said == []
    waiting.servers = FakeTable([record("a"), record("c")]).servers
    await waiting.followed(HEAD)
    await waiting.followed(HEAD)
    assert said == ["servers: b gone, c new; 2 serve"]


async def test_a_laggard_is_waited_for_once() -> None:
    slow = [record("a"), record("b", 1, error="disk full")]
    waiting, said = patience(slow, wait_s=0.2)
    await waiting.followed(HEAD)
    assert said == ["b does not follow to version 2 (disk full); it is left behind until it does"]
    waiting.wait_s = 60.0
    async with asyncio.timeout(1):
        await waiting.followed(HEAD)
    assert len(said) == 1
    # Once it has caught up, it is waited for like any other.
    waiting.servers = FakeTable([record("a"), record("b")]).servers
    await waiting.followed(HEAD)
    assert waiting.behind == {}


async def test_a_server_that_fails_is_named_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.patience.QUIET_S", 0.0)
    waiting, said = patience([record("a"), record("b", 1, error="disk full")], wait_s=0.2)
    await waiting.followed(HEAD)
    assert said[0] == "version 2 waits for b (disk full), at most 0 s"
    assert len(said) == 2  # and that it is left behind


async def test_with_a_grace_the_others_have_that_much_more() -> None:
    waiting, said = patience([record("a"), record("b", 1)], wait_s=60.0)
    async with asyncio.timeout(2):
        holders = await waiting.followed(HEAD, all_within_s=0.1)
    assert [r.server_id for r in holders] == ["a"]
    assert (said, waiting.behind) == ([], {})  # it is slower than others, and no worse


async def test_enough_that_do_not_follow_are_an_error_that_says_what_they_say() -> None:
    waiting, _ = patience(
        [record("a"), record("b", 1, error="disk full")], min_servers=2, wait_s=0.1
    )
    with pytest.raises(
        FleetError, match=r"1 of at least 2 servers hold it after 0 s; b: disk full"
    ):
        await waiting.followed(HEAD)


async def test_the_pause_has_a_bound_and_a_remedy() -> None:
    waiting, _ = patience([], pause_s=0.1)
    with pytest.raises(FleetError, match=r"0 of 1 servers serve after a pause.*--resume"):
        await waiting.enough()


class FakeClock:
    """Time that passes only where somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("trainer.patience.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("trainer.patience.asyncio", SimpleNamespace(sleep=self.sleep))

    async def sleep(self, delay_s: float) -> None:
        self.now += delay_s


async def test_a_pause_counts_from_the_shortage_and_not_from_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The servers were there for longer than a pause may take, and then away for less than that, twice."""
    clock = FakeClock(monkeypatch)
    waiting, said = patience([], wait_s=60.0, pause_s=1.0)

    async def servers() -> list[ServerRecord]:
        if clock.now < 20:
            return [record("a", 1)]
        if clock.now < 20.8 or 40 <= clock.now < 40.8:
            return []
        return [record("a", 1 if clock.now < 60 else 2)]

    waiting.servers = servers
    assert [r.server_id for r in await waiting.followed(HEAD)] == ["a"]
    assert (
        said
        == [
            "0 of 1 servers serve; waiting, at most 1 s",
            "enough servers serve (1); going on",
        ]
        * 2
    )


async def test_servers_that_die_again_and_again_are_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(monkeypatch)
    waiting, said = patience([], wait_s=60.0, pause_s=10.0)

    async def servers() -> list[ServerRecord]:
        return [record("a", 1)] if clock.now % 16 < 8 else []

    waiting.servers = servers
    with pytest.raises(FleetError, match="0 of 1 servers serve"):
        await waiting.followed(HEAD)
    assert len(said) == 7  # four pauses of 8 s; the last one did not end


async def test_a_long_table_is_read_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand servers take 28 ms of the trainer's loop a look."""
    clock, looks = FakeClock(monkeypatch), []
    waiting, _ = patience([], wait_s=60.0)

    async def servers() -> list[ServerRecord]:
        looks.append(clock.now)
        clock.now += 0.03
        return [record("a", 1 if clock.now < 3 else 2)]

    waiting.servers = servers
    await waiting.followed(HEAD)
    assert len(looks) == 11  # one in 0.33 s


STALE = ServerState.STALE
NO_MANIFEST = "version 2: no readable manifest"


async def test_who_lives_and_reports_an_error_is_named_when_it_does_and_at_the_end() -> None:
    """As where the store is a folder of the trainer's machine alone."""
    loading = record("b", 0, ServerState.LOADING)
    failing = [record("a", 0, STALE, NO_MANIFEST), loading]
    waiting, said = patience([], [loading], failing, min_servers=2, pause_s=1.0)
    with pytest.raises(FleetError) as ended:
        await waiting.followed(HEAD)
    why = f"0 of 2 servers serve (a stale: {NO_MANIFEST}; b loading)"
    assert said == [
        "0 of 2 servers serve; waiting, at most 1 s",
        f"{why}; waiting, at most 1 s",
    ]
    assert str(ended.value).startswith(f"{why} after a pause of 1 s; start servers")


async def test_of_many_that_report_errors_one_is_named() -> None:
    many = [record(f"s{n}", 0, STALE, NO_MANIFEST if n else None) for n in range(100)]
    waiting, _ = patience(many, pause_s=0.0)
    some = f"100 do not, such as s1 stale: {NO_MANIFEST}"
    with pytest.raises(FleetError, match=rf"^0 of 1 servers serve \({some}\) after a pause"):
        await waiting.enough()


@pytest.mark.parametrize("wait", ["followed", "enough"])
async def test_where_all_who_could_serve_report_errors_the_run_ends_sooner(
    wait: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(monkeypatch)
    waiting, _ = patience([record("a", 0, STALE, NO_MANIFEST)], wait_s=300.0, pause_s=3600.0)
    with pytest.raises(FleetError, match=rf"\(a stale: {NO_MANIFEST}\), and .* for 300 s; mend"):
        await (waiting.followed(HEAD) if wait == "followed" else waiting.enough())
    assert 300 < clock.now < 301


@pytest.mark.parametrize("other", [ServerState.LOADING, ServerState.DRAINING, None])
async def test_where_another_may_come_the_run_waits_on(
    other: ServerState | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(monkeypatch)
    others = [] if other is None else [record("b", 0, other)]
    waiting, _ = patience(
        [record("a", 0, STALE, NO_MANIFEST), *others], min_servers=2, wait_s=300.0, pause_s=3600.0
    )
    with pytest.raises(FleetError, match="after a pause of 3600 s"):
        await waiting.enough()
    assert clock.now > 3600


async def test_an_error_that_goes_away_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    waiting, _ = patience([], wait_s=300.0, pause_s=3600.0)

    async def servers() -> list[ServerRecord]:
        failing = clock.now < 250 or 260 < clock.now < 500
        return [record("a", 0, STALE, NO_MANIFEST if failing else None)][: clock.now < 600] or [
            record("a")
        ]

    waiting.servers = servers
    assert await waiting.enough() is True


async def test_a_version_on_its_way_to_who_lives_is_not_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As between the first announcement and its taking: nobody serves a checkpoint then."""
    clock = FakeClock(monkeypatch)
    waiting, said = patience([], pause_s=60.0)

    async def servers() -> list[ServerRecord]:
        return [record("a") if clock.now > taken_at else record("a", 0, STALE)]

    waiting.servers = servers
    taken_at = 9.0
    await waiting.followed(HEAD)
    assert said == []
    taken_at = 29.0
    await waiting.followed(HEAD)
    assert said == [
        "0 of 1 servers serve (a stale); waiting, at most 60 s",
        "enough servers serve (1); going on",
    ]


async def test_redis_away_is_waited_for_and_told_once() -> None:
    waiting, said = patience(AWAY, AWAY, [record("a")])
    assert await waiting.enough() is False
    assert said == [f"{AWAY}; the run waits, at most 5 s", "Redis answers; the run goes on"]


async def test_redis_away_for_too_long_is_an_error_and_a_lost_lease_at_once() -> None:
    waiting, _ = patience(AWAY, pause_s=0.1)
    with pytest.raises(CoordinationError, match="given up after 0 s"):
        await waiting.enough()
    waiting, said = patience(LeaseError("another trainer"))
    with pytest.raises(LeaseError):
        await waiting.enough()
    assert said == []


async def test_a_redis_that_refuses_is_an_error_at_once(redis_url: str) -> None:
    """It answers: another call would be refused likewise."""
    waiting, said = patience([])
    refusing = RedisCoordinator(redis_url.replace("redis://", "redis://nobody:wrong@"), "r")
    waiting.servers = refusing.servers
    async with asyncio.timeout(4):
        with pytest.raises(CoordinationError, match="username-password"):
            await waiting.enough()
    await refusing.close()
    assert said == []


async def test_trees_go_to_the_last_known_servers_while_redis_is_away() -> None:
    table = FakeTable([record("a")], AWAY, [], AWAY, [record("b")])
    servers = registered(table)  # type: ignore[arg-type]
    listed = [[target.url for target in await servers()] for _ in range(5)]
    # A Redis that restarted empty names nobody, and is not what is remembered.
    assert listed == [["http://a"], ["http://a"], [], ["http://a"], ["http://b"]]


async def test_a_redis_that_never_answered_is_an_error() -> None:
    with pytest.raises(CoordinationError, match="does not answer"):
        await registered(FakeTable(AWAY))()  # type: ignore[arg-type]
