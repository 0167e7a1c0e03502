"""Coordination through Redis: lease, head, events and the fleet table. The one file that imports redis.

Weights never pass through here. Every call has a bound in time; a Redis that is away is a `CoordinationError`
that names its address (never its password).
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Protocol, TypeVar

import redis.asyncio
from pydantic import ValidationError
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import ConfigError, CoordinationError, LeaseError, LeaseHeldError
from shared.fleet import Head, ServerRecord
from shared.keys import Keys
from shared.redis_url import check_files, redacted

log = logging.getLogger("spoke.coordination")

T = TypeVar("T")

LEASE_S = 10.0
"""Lifetime of the trainer's lease, seconds."""
RECORD_S = 5.0
"""Lifetime of a server's record, seconds."""
CALL_S = 5.0
"""Bound of one call to Redis, seconds."""
CLOSE_S = 1.0
"""How long calls that were given up may take to let go of their connections, seconds."""
NO_EVENT = "0-0"
"""Id before the first event."""


class Leases(Protocol):
    """What a trainer needs to be the one that publishes."""

    async def acquire_lease(self, owner: str) -> str:
        """Take the run for `owner`, a name that no other process has; returns a token that is never given again.

        Raises:
            LeaseHeldError: another owner holds it.
        """
        ...

    async def renew_lease(self, token: str, *, release: bool = False) -> None:
        """Keep or release the lease. Raises LeaseError when it is no longer ours."""
        ...

    async def announce(self, token: str, head: Head) -> None:
        """Set the head, once its bytes are durable; announcing the same head again changes nothing.

        Raises:
            LeaseError: the lease is no longer ours, or the version does not grow.
            CoordinationError: Redis is away.
        """
        ...


class Coordinator(Protocol):
    """What both sides need of Redis."""

    async def head(self) -> Head | None:
        """The newest announced version; None before the first.

        Raises:
            CoordinationError: Redis is away, or holds a head that cannot be read.
        """
        ...

    async def restore(self, head: Head) -> bool:
        """Give a Redis that lost it a head that was announced before; no lease needed.

        Returns:
            Whether it was restored: a head as high or higher stays as it is.
        """
        ...

    async def wait_event(self, after: str, timeout_s: float) -> str:
        """Id of the newest event, once it is another than `after`; `after` itself when none came in time.

        Another and not a later one: a Redis that restarted empty, or whose clock jumped back, gives lower ids.
        """
        ...

    async def report(self, record: ServerRecord) -> None:
        """Write a server's record and renew its lease.

        Raises:
            ConfigError: another living server has this id.
            CoordinationError: Redis is away.
        """
        ...

    async def leave(self, server_id: str, instance: str = "") -> None:
        """Remove a server's record; that of another instance under the same id stays."""
        ...

    async def servers(self) -> list[ServerRecord]:
        """Records of the live servers, by id; one that cannot be read is left out, with a warning."""
        ...


@cache
def _script(name: str) -> str:
    return (files("shared") / "lua" / f"{name}.lua").read_text()


def _pairs(head: Head) -> list[str]:
    """A head as the names and values of a Redis hash, in turn."""
    return [part for field in head.fields().items() for part in field]


def is_away(error: CoordinationError) -> bool:
    """May the same call go well later? Not where Redis answered, with a refusal."""
    away = (OSError, RedisConnectionError, RedisTimeoutError)  # TimeoutError is an OSError
    cause = error.__cause__
    return isinstance(cause, away) and not isinstance(cause, AuthenticationError)


def id_taken(server_id: str, url: str) -> str:
    """What two servers under one id are told: each would overwrite the other's record."""
    return f"--server-id {server_id}: the server at {url} lives under this id; give each its own, or leave it out"


def _first_fault(error: ValidationError) -> str:
    """What is wrong with what was read, in a few words."""
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'all of it'}: {fault['msg']}"


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _unread(task: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


class RedisCoordinator:
    """`Leases` and `Coordinator` on one Redis. Every expiry is by Redis' own clock.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        run: name of the run.

    Raises:
        ConfigError: the URL or the run's name cannot be used.
    """

    def __init__(self, url: str, run: str) -> None:
        try:
            self._keys = Keys(run)
        except ValueError as error:
            raise ConfigError(f"--run: {error}") from None
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                protocol=2,  # one shape of answers from every server
                socket_timeout=CALL_S,
                socket_connect_timeout=CALL_S,
            )
        except ValueError:  # its text may quote a part of the password
            raise ConfigError(
                f"--redis-url {redacted(url)}: write redis://, rediss:// or unix://, then HOST:PORT/NUMBER; "
                "/ ? # and @ in a password are %2F %3F %23 and %40"
            ) from None
        check_files(url)
        self._where = redacted(url)
        self._given_up: set[asyncio.Future[Any]] = set()
        self._unreadable: set[str] = set()
        """Ids of servers whose records cannot be read: told once."""

    @property
    def keys(self) -> Keys:
        """Names of the run's keys."""
        return self._keys

    async def _call(self, call: Awaitable[T], bound_s: float = CALL_S) -> T:
        # A task of its own: redis-py may swallow a cancellation while it connects, and with it a server's stop.
        task = asyncio.ensure_future(call)
        try:
            done, _ = await asyncio.wait({task}, timeout=bound_s)
            if not done:
                raise TimeoutError(f"nothing came within {bound_s:g} s")
            return task.result()
        except AuthenticationError as error:
            raise CoordinationError(
                f"Redis at {self._where} does not let this client in: {_reason(error)}; see to the user "
                "and password in SPOKE_REDIS_URL"
            ) from error
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise CoordinationError(
                f"Redis at {self._where} does not answer: {_reason(error)}"
            ) from error
        finally:
            if not task.done():
                self._given_up.add(task)
                task.add_done_callback(self._given_up.discard)
                task.add_done_callback(_unread)
                task.cancel()

    async def script(self, name: str, keys: Sequence[str], args: Sequence[str | int]) -> Any:  # noqa: ANN401
        """Run `shared/lua/NAME.lua`; its first lines say what it takes and returns.

        By its text: scripts are short, and a Redis that restarted empty knows no hashes.

        Raises:
            CoordinationError: Redis is away.
        """
        return await self._call(self._redis.eval(_script(name), len(keys), *keys, *args))

    async def ping(self) -> None:
        """Raise CoordinationError unless Redis answers."""
        await self._call(self._redis.ping())

    async def close(self) -> None:
        """Close the connections, those of calls that were given up too."""
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=CLOSE_S)
        await self._redis.aclose()

    async def acquire_lease(self, owner: str) -> str:
        """See `Leases.acquire_lease`."""
        keys = [self._keys.lease, self._keys.fence]
        args: list[str | int] = [owner, int(LEASE_S * 1000), secrets.token_hex(8)]
        taken, *answer = await self.script("acquire_lease", keys, args)
        if not taken:
            holder, left_ms = answer
            raise LeaseHeldError(self._keys.run, str(holder), int(left_ms) / 1000)
        return str(answer[0])

    async def renew_lease(self, token: str, *, release: bool = False) -> None:
        """See `Leases.renew_lease`."""
        lifetime = 0 if release else int(LEASE_S * 1000)
        if not await self.script("renew_lease", [self._keys.lease], [token, lifetime]):
            raise LeaseError(
                f"the lease on run {self._keys.run!r} is gone: another trainer may hold it"
            )

    async def announce(self, token: str, head: Head) -> None:
        """See `Leases.announce`."""
        keys = [self._keys.lease, self._keys.head, self._keys.events]
        args: list[str | int] = [token, head.version, head.manifest_digest, *_pairs(head)]
        done, answer = await self.script("announce", keys, args)
        if not done and answer == "lease":
            raise LeaseError(
                f"the lease on run {self._keys.run!r} is gone; version {head.version} is not announced"
            )
        if not done:
            raise LeaseError(
                f"version {head.version} cannot follow version {answer}, which is announced"
            )

    async def head(self) -> Head | None:
        """See `Coordinator.head`."""
        fields = await self._call(self._redis.hgetall(self._keys.head))
        try:
            return Head.of(fields) if fields else None
        except ValidationError as error:
            raise CoordinationError(
                f"the head of run {self._keys.run!r} in Redis at {self._where} cannot be read: "
                f"{_first_fault(error)}; another version of Spoke may have written {self._keys.head}"
            ) from None

    async def restore(self, head: Head) -> bool:
        """See `Coordinator.restore`."""
        keys = [self._keys.head, self._keys.events]
        return bool(await self.script("restore", keys, [head.version, *_pairs(head)]))

    async def wait_event(self, after: str, timeout_s: float) -> str:
        """See `Coordinator.wait_event`."""
        newest = await self._call(self._redis.xrevrange(self._keys.events, count=1))
        last = str(newest[0][0]) if newest else NO_EVENT
        if last not in (after, NO_EVENT):
            return last
        block = min(timeout_s, CALL_S - 1.0)
        # After `last`, not `after`: in a stream that was emptied every event is a new one.
        call = self._redis.xread({self._keys.events: last}, block=max(1, int(block * 1000)))
        answer = await self._call(call, block + CALL_S)
        return str(answer[0][1][-1][0]) if answer else after

    async def report(self, record: ServerRecord) -> None:
        """See `Coordinator.report`."""
        text, server_id = record.model_dump_json(), record.server_id
        written, *holder = await self.script(
            "report",
            [self._keys.server(server_id), self._keys.servers],
            [text, int(RECORD_S * 1000), record.instance, server_id],
        )
        if not written:
            raise ConfigError(id_taken(server_id, holder[0]))

    async def leave(self, server_id: str, instance: str = "") -> None:
        """See `Coordinator.leave`."""
        keys = [self._keys.server(server_id), self._keys.servers]
        await self.script("leave", keys, [instance, server_id])

    async def servers(self) -> list[ServerRecord]:
        """See `Coordinator.servers`."""
        ids = sorted(await self._call(self._redis.smembers(self._keys.servers)))
        if not ids:
            return []
        found = await self._call(self._redis.mget([self._keys.server(i) for i in ids]))
        gone = [i for i, text in zip(ids, found, strict=True) if text is None]
        if gone:
            keys = [self._keys.servers, *(self._keys.server(i) for i in gone)]
            await self.script("forget_servers", keys, gone)
        records = (self._record(i, t) for i, t in zip(ids, found, strict=True) if t is not None)
        return [record for record in records if record is not None]

    def _record(self, server_id: str, text: str) -> ServerRecord | None:
        """None where it cannot be read: one server of another version must not end all others."""
        try:
            record = ServerRecord.model_validate_json(text)
        except ValidationError as error:
            if server_id not in self._unreadable:
                log.warning(
                    "the record of server %s cannot be read: %s; it is left out",
                    server_id,
                    _first_fault(error),
                )
            self._unreadable.add(server_id)
            return None
        self._unreadable.discard(server_id)
        return record
