"""A client process for benchmarks: many tree requests over real sockets, decoded once the clock has stopped.

Reads a `Load` as JSON from standard input, and writes an `Outcome`. A request that is told to come back (429, 503)
does so when it was told, with a little jitter, if `retry` says so.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a client process is to do."""

    url: str
    bodies: list[dict[str, Any]]
    concurrency: int
    accept: str = "application/msgpack"
    retry: bool = True
    seconds: float = 600.0
    """When to stop starting requests."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a client process saw."""

    wall_s: float
    seconds: list[float]
    """[N] of each request that was answered, its retries included."""
    sampled_tokens: int
    bytes: int
    statuses: dict[str, int]
    """Answers by status, those that were tried again included."""


async def run(load: Load) -> Outcome:
    """Send everything; the answers are decoded after the clock has stopped."""
    import httpx

    bodies = iter(load.bodies)
    answers: list[tuple[float, bytes]] = []
    statuses: dict[str, int] = {}
    limits = httpx.Limits(max_connections=load.concurrency + 1)
    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=600.0, limits=limits) as client:

        async def work() -> None:
            for body in bodies:
                if time.perf_counter() - began > load.seconds:
                    return
                content = json.dumps(body).encode()
                started = time.perf_counter()
                while True:
                    answer = await client.post(
                        f"{load.url}/rollout_tree",
                        content=content,
                        headers={"content-type": "application/json", "accept": load.accept},
                    )
                    status = str(answer.status_code)
                    statuses[status] = statuses.get(status, 0) + 1
                    if answer.status_code not in (429, 503) or not load.retry:
                        break
                    wait = float(answer.headers["retry-after"])
                    await asyncio.sleep(wait * (1 + random.random() / 4))
                if answer.status_code == 200:
                    answers.append((time.perf_counter() - started, answer.content))

        await asyncio.gather(*(work() for _ in range(load.concurrency)))
    wall = time.perf_counter() - began
    return Outcome(
        wall_s=wall,
        seconds=[seconds for seconds, _ in answers],
        sampled_tokens=sum(tokens_of(body, load.accept) for _, body in answers),
        bytes=sum(len(body) for _, body in answers),
        statuses=statuses,
    )


def tokens_of(body: bytes, accept: str) -> int:
    """Sampled tokens of one answer."""
    if accept == "application/json":
        return int(json.loads(body)["usage"]["sampled_tokens"])
    from shared.codec import MediaType, decode

    return decode(body, MediaType(accept)).usage.sampled_tokens


if __name__ == "__main__":
    outcome = asyncio.run(run(Load(**json.load(sys.stdin))))
    json.dump(asdict(outcome), sys.stdout)
