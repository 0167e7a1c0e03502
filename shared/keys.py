"""Every Redis key of a run. Redis holds coordination only: all of it can be rebuilt.

| key                          | type    | lifetime        | written by       | read by           |
|------------------------------|---------|-----------------|------------------|-------------------|
| `spoke:{RUN}:lease`          | hash    | lease (10 s)    | the trainer      | announce.lua      |
| `spoke:{RUN}:fence`          | integer | the run         | acquire_lease    | acquire_lease     |
| `spoke:{RUN}:head`           | hash    | the run         | announce, restore| servers, trainer  |
| `spoke:{RUN}:events`         | stream  | ~1000 entries   | announce, restore| servers           |
| `spoke:{RUN}:servers`        | set     | the run         | servers; readers | trainer, commands |
| `spoke:{RUN}:server:ID`      | string  | lease (5 s)     | report, leave    | trainer, commands |
| `spoke:{RUN}:holders:V:PART` | zset    | 60 s            | their servers    | claim_source      |
| `spoke:{RUN}:slots:SOURCE`   | zset    | claim (15 s)    | claim_source     | claim_source      |

A Redis that restarted empty gets the head back from whoever remembers it (restore.lua), the servers with their
next record, the lease from its trainer.

The braces are Redis' hash tag: all keys of a run live on one node of a cluster, as the scripts need.
"""

from dataclasses import dataclass

from shared.manifest import check_run_name


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the keys of one run.

    Raises:
        ValueError: the run's name cannot be used in a key.
    """

    run: str

    def __post_init__(self) -> None:
        check_run_name(self.run)

    def _key(self, name: str) -> str:
        return f"spoke:{{{self.run}}}:{name}"

    @property
    def lease(self) -> str:
        """Who may publish, with the fencing token."""
        return self._key("lease")

    @property
    def fence(self) -> str:
        """Counter of fencing tokens."""
        return self._key("fence")

    @property
    def head(self) -> str:
        """The newest announced version."""
        return self._key("head")

    @property
    def events(self) -> str:
        """Wakes the followers."""
        return self._key("events")

    @property
    def servers(self) -> str:
        """Ids of servers that ever joined; a dead one is removed by whoever notices."""
        return self._key("servers")

    def server(self, server_id: str) -> str:
        """One server's record, JSON."""
        return self._key(f"server:{server_id}")

    def holders(self, version: int, part: str) -> str:
        """URLs of servers that said a moment ago that they hold a version's `delta` or `full` files."""
        return self._key(f"holders:{version}:{part}")

    def slots(self, source: str) -> str:
        """Who fetches from a source now."""
        return self._key(f"slots:{source}")
