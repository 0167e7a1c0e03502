"""What leaves the trainer when a version goes to 1, 2, 4 and 8 servers, with and without their asking one another.

The trainer's uplink is what is scarce with servers that are far away: without peers it carries a copy for each of
them. All but the engines is real: the trainer's file server (`spoke store`), a process for each server with its
holdings, its route for peers and its fetcher, sockets of this machine, and Redis. Bytes are those that the file
server counts, manifests included; copies, as often what one server needs of the version. Seconds are from the word
to the last server that has it, on this machine's cores and without a network between; they say little about one.

    python tests/benchmarks/fan_out.py [--servers 1,2,4,8] [--anchor-mib 64] [--delta-mib 2]
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a program, not a package: it runs from any folder

import httpx  # noqa: E402 - after the path
from support import free_port, running_redis  # noqa: E402 - after the path
from versions import Versions  # noqa: E402 - after the path

from shared.fleet import Head  # noqa: E402 - after the path
from shared.manifest import Manifest  # noqa: E402 - after the path

MIB = 1 << 20


def main() -> None:
    """Measure, and print a table for people and a line of JSON."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("--servers", default="1,2,4,8")
    parse.add_argument("--anchor-mib", type=int, default=64)
    parse.add_argument("--delta-mib", type=int, default=2)
    parse.add_argument("--worker", nargs=4, metavar=("FOLDER", "REDIS_URL", "RUN", "PEERS"))
    args = parse.parse_args()
    if args.worker:
        asyncio.run(worker(*args.worker))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch, running_redis() as server:
        for peers in (False, True):
            for count in map(int, args.servers.split(",")):
                folder = Path(scratch) / f"{count}-{peers}"
                rows += fan_out(folder, server.url, count, peers, args.anchor_mib, args.delta_mib)
                shutil.rmtree(folder)
    print(
        f"{'servers':>7}  {'peers':5}  {'version':7}  {'MiB out':>8}  {'copies':>6}  {'last has it':>11}"
    )
    for row in rows:
        print(
            f"{row['servers']:7d}  {'yes' if row['peers'] else 'no':5}  {row['version']:7}  "
            f"{row['bytes'] / MIB:8.2f}  {row['copies']:6.2f}  {row['seconds']:9.2f} s"
        )
    print(json.dumps({"rows": rows}))


def fan_out(
    folder: Path, redis_url: str, count: int, peers: bool, anchor_mib: int, delta_mib: int
) -> list[dict[str, Any]]:
    """An anchor to a fleet that has nothing, then a delta to the same fleet."""
    shard = anchor_mib * MIB // 4
    run = f"run-{uuid.uuid4().hex[:8]}"
    versions = Versions(folder, shards=(shard,) * 4, delta=delta_mib * MIB, run=run)
    versions.root.mkdir(parents=True)
    rows = []
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(store(versions.root))
        fleet = [
            stack.enter_context(server(folder / f"{n}", redis_url, run, peers))
            for n in range(count)
        ]
        for one in fleet:
            assert said(one) == "ready"
        for version in ("anchor", "delta"):
            versions.publish()
            before, head = sent(url), versions.head(store=url)
            started = time.perf_counter()
            for one in fleet:
                assert one.stdin is not None
                one.stdin.write(head.model_dump_json() + "\n")
                one.stdin.flush()
            for one in fleet:
                assert said(one) == "held"
            seconds = time.perf_counter() - started
            out = sent(url) - before
            rows.append({
                "servers": count, "peers": peers, "version": version, "bytes": int(out),
                "copies": out / size(versions.manifests[-1]), "seconds": seconds,
            })  # fmt: skip
    return rows


def size(manifest: Manifest) -> int:
    """Bytes that one server needs of a version."""
    return sum(entry.size for entry in manifest.files) + len(manifest.encode())


def sent(url: str) -> float:
    """Bytes of files that the store has sent."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("spoke_store_sent_bytes_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in counts)


def said(process: "subprocess.Popen[str]") -> str:
    """The next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextlib.contextmanager
def server(
    folder: Path, redis_url: str, run: str, peers: bool
) -> Iterator["subprocess.Popen[str]"]:
    """A process that fetches each head that it is told, and serves what it holds."""
    command = [sys.executable, __file__, "--worker", str(folder), redis_url, run, str(int(peers))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


async def worker(folder: str, redis_url: str, run: str, peers: str) -> None:
    """One server; heads come on standard input."""
    from weight_servers import peer

    async with peer(Path(folder), redis_url, run=run, peers=peers == "1") as one:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await one.fetcher.chain_to(Head.model_validate_json(line))
            print("held", flush=True)


@contextlib.contextmanager
def store(root: Path) -> Iterator[str]:
    """URL of the trainer's file server."""
    port = free_port()
    command = [sys.executable, "-m", "trainer.cli", "store", str(root), "--port", str(port)]
    environment = {name: text for name, text in os.environ.items() if name != "SPOKE_STORE_TOKEN"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/livez")
                break
            assert process.poll() is None, "the file server ended"
            assert time.monotonic() < until
            time.sleep(0.05)
        yield url
        process.terminate()
        process.wait(20)


if __name__ == "__main__":
    main()
