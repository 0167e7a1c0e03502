"""A trainer that publishes one version and can be stopped in the middle of it, for tests of its end.

    python publisher_process.py REDIS_URL RUN LEASE_S STORE VERSION

Says "files" once the version's files are in the store and waits for a line on its input before it goes on to the
manifest; then what became of it: {"published": VERSION} or {"ended": why}, one JSON value a line.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared import coordination
from shared.coordination import RedisCoordinator
from shared.errors import LeaseError
from shared.fsspec_store import FsspecStore
from shared.manifest import Manifest
from trainer.lease import hold
from trainer.publish import Publisher


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


class Store(FsspecStore):
    def publish(
        self, manifest: Manifest, folder: Path, *, before_manifest: Callable[[], None], **rest: Any
    ) -> None:
        def between() -> None:
            say("files")
            os.read(
                0, 100
            )  # without a lock, which would end a process that is interrupted here by an abort
            before_manifest()

        super().publish(manifest, folder, before_manifest=between, **rest)


async def main(url: str, run: str, lease_s: str, folder: str, version: str) -> None:
    coordination.LEASE_S = float(lease_s)
    redis, store = RedisCoordinator(url, run), Store(folder, "run")
    try:
        async with hold(redis, store.versions, run, lambda text: None) as lease:
            publisher = Publisher(
                store=store, store_url=folder, coordinator=redis, lease=lease, run="run", dtype="float32"
            )  # fmt: skip
            await publisher.publish(int(version), {"a": torch.ones(8)})
            say({"published": int(version)})
    except LeaseError as error:
        say({"ended": str(error)})
    await redis.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
