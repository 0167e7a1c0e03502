"""Coordination through Redis: lease, head, events and the fleet table. The one file that imports redis.

Weights never pass through here. Every call has a bound in time; a Redis that is away is a `CoordinationError`
that names its address (never its password).
"""

import asyncio
from collections.abc import Awaitable, Sequence
from importlib.resources import files
from typing import Any, Protocol, TypeVar

import redis.asyncio
from redis.exceptions import RedisError

from shared.errors import ConfigError, CoordinationError, LeaseError
from shared.fleet import Head, ServerRecord
from shared.keys import Keys
from shared.redis_url import redacted

T = TypeVar("T")

LEASE_S = 10.0
"""Lifetime of the trainer's lease, seconds."""
RECORD_S = 5.0
"""Lifetime of a server's record, seconds."""
CALL_S = 5.0
"""Bound of one call to Redis, seconds."""


class Coordinator(Protocol):
    """What both sides need of Redis."""

    async def acquire_lease(self, owner: str) -> str:
        """Take the run for `owner`; returns the fencing token. Raises LeaseError when another holds it."""
        ...

    async def renew_lease(self, token: str, *, release: bool = False) -> None:
        """Keep or release the lease. Raises LeaseError when it is no longer ours."""
        ...

    async def announce(self, token: str, head: Head) -> None:
        """Set the head, once its bytes are durable.

        Raises:
            LeaseError: the lease is no longer ours.
            CoordinationError: the version does not grow, or Redis is away.
        """
        ...

    async def head(self) -> Head | None:
        """The newest announced version; None before the first."""
        ...

    async def wait_event(self, after: str, timeout_s: float) -> str:
        """Id of the newest event later than `after`, or `after` itself when none came in time."""
        ...

    async def report(self, record: ServerRecord) -> None:
        """Write a server's record and renew its lease."""
        ...

    async def leave(self, server_id: str) -> None:
        """Remove a server's record."""
        ...

    async def servers(self) -> list[ServerRecord]:
        """Records of the live servers, by id."""
        ...


class RedisCoordinator:
    """A `Coordinator` on one Redis.

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
        self._where = redacted(url)
        scripts = files("shared") / "lua"
        self._acquire, self._renew, self._announce = (
            (scripts / f"{name}.lua").read_text()
            for name in ("acquire_lease", "renew_lease", "announce")
        )

    async def _call(self, call: Awaitable[T], bound_s: float = CALL_S) -> T:
        try:
            # Not `wait_for`, which in Python 3.11 may swallow a cancellation, and with it a server's stop.
            async with asyncio.timeout(bound_s):
                return await call
        except (RedisError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise CoordinationError(f"Redis at {self._where} does not answer: {reason}") from error

    async def _eval(self, script: str, keys: Sequence[str], args: Sequence[str | int]) -> Any:  # noqa: ANN401
        """Run a script by its text: they are short, and a Redis that restarted empty knows no hashes."""
        return await self._call(self._redis.eval(script, len(keys), *keys, *args))

    async def ping(self) -> None:
        """Raise CoordinationError unless Redis answers."""
        await self._call(self._redis.ping())

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def acquire_lease(self, owner: str) -> str:
        """See `Coordinator.acquire_lease`."""
        keys = [self._keys.lease, self._keys.fence]
        taken, answer = await self._eval(self._acquire, keys, [owner, int(LEASE_S * 1000)])
        if not taken:
            raise LeaseError(
                f"run {self._keys.run!r} is being trained by {answer}; stop it, or wait {LEASE_S:.0f} s "
                "after it died, or use another --run"
            )
        return str(answer)

    async def renew_lease(self, token: str, *, release: bool = False) -> None:
        """See `Coordinator.renew_lease`."""
        lifetime = 0 if release else int(LEASE_S * 1000)
        if not await self._eval(self._renew, [self._keys.lease], [token, lifetime]):
            raise LeaseError(
                f"the lease on run {self._keys.run!r} is gone: another trainer may hold it"
            )

    async def announce(self, token: str, head: Head) -> None:
        """See `Coordinator.announce`."""
        keys = [self._keys.lease, self._keys.head, self._keys.events]
        args: list[str | int] = [
            token,
            head.version,
            head.manifest_digest,
            head.weights_digest,
            head.store,
        ]
        done, answer = await self._eval(self._announce, keys, args)
        if not done and answer == "lease":
            raise LeaseError(
                f"the lease on run {self._keys.run!r} is gone; version {head.version} is not announced"
            )
        if not done:
            raise CoordinationError(
                f"version {head.version} cannot follow version {answer}, which is announced"
            )

    async def head(self) -> Head | None:
        """See `Coordinator.head`."""
        fields = await self._call(self._redis.hgetall(self._keys.head))
        return Head.of(fields) if fields else None

    async def wait_event(self, after: str, timeout_s: float) -> str:
        """See `Coordinator.wait_event`."""
        block = min(timeout_s, CALL_S - 1.0)
        call = self._redis.xread({self._keys.events: after}, block=max(1, int(block * 1000)))
        answer = await self._call(call, block + CALL_S)
        return str(answer[0][1][-1][0]) if answer else after

    async def report(self, record: ServerRecord) -> None:
        """See `Coordinator.report`."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.set(
            self._keys.server(record.server_id), record.model_dump_json(), px=int(RECORD_S * 1000)
        )
        pipe.sadd(self._keys.servers, record.server_id)
        await self._call(pipe.execute())

    async def leave(self, server_id: str) -> None:
        """See `Coordinator.leave`."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(self._keys.server(server_id))
        pipe.srem(self._keys.servers, server_id)
        await self._call(pipe.execute())

    async def servers(self) -> list[ServerRecord]:
        """See `Coordinator.servers`."""
        ids = sorted(await self._call(self._redis.smembers(self._keys.servers)))
        if not ids:
            return []
        found = await self._call(self._redis.mget([self._keys.server(i) for i in ids]))
        return [ServerRecord.model_validate_json(text) for text in found if text is not None]
