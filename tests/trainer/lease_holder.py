"""A trainer of nothing: holds a run's lease and announces versions when told to, for tests that kill or stop it.

    python lease_holder.py REDIS_URL RUN LEASE_S VERSION

Announces VERSION, then what `announce N` on its input says. One JSON object a line on its output; exit code 1 with
{"ended": why} when the run is another trainer's.
"""

import asyncio
import json
import os
import sys

from shared import coordination
from shared.coordination import RedisCoordinator
from shared.errors import LeaseError
from shared.fleet import Head
from trainer.lease import hold


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def train(url: str, run: str, version: str) -> None:
    redis = RedisCoordinator(url, run)
    stored = -1
    async with hold(redis, lambda: [stored], run, lambda text: None) as lease:
        words = ["announce", version]
        while words:
            number = int(words[1])
            lease.begin(number)
            stored = number
            await lease.announce(
                Head(version=number, manifest_digest="m", weights_digest="w", store="file:///s")
            )
            say(announced=number)
            words = (await asyncio.to_thread(sys.stdin.readline)).split()


async def main(url: str, run: str, lease_s: str, version: str) -> None:
    coordination.LEASE_S = float(lease_s)
    try:
        await train(url, run, version)
    except LeaseError as error:
        say(ended=str(error))
        os._exit(1)  # else the thread that reads standard input is waited for


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
