"""A real server under load: what it yields beyond its capacity, and what ten rough minutes leave behind.

`saturation` offers 0.5, 1, 2 and 4 times what the server takes on at once, in turns. Goodput is the sampled tokens
of complete answers a second, behind the ramp; a client that gets 429 comes back when it was told.

`soak` offers twice the capacity with all plans and forms mixed, and clients that leave, read slowly or ask twice
by one id. Every tree that arrives is checked for structure, rewards and values, some against a plain forward pass.
Afterwards nothing may be in flight, in the server or in its engine, and memory may not have grown.

Exit code 1 when anything was not as it must be; wrong trees are then in files. All on the loopback interface.

    python tests/benchmarks/load.py saturation [--engine vllm] [--seconds 30] [--rounds 3]
    python tests/benchmarks/load.py soak [--engine vllm] [--minutes 10]
"""

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

import httpx  # noqa: E402 - after the path

from tests.benchmarks.load_parts.bench import SETTLE_S, Bench  # noqa: E402
from tests.benchmarks.load_parts.saturation import MULTIPLES, TAIL_S, saturation  # noqa: E402
from tests.benchmarks.load_parts.soak import soak, soak_table  # noqa: E402
from tests.benchmarks.load_parts.watch import Watch, running, tree_of  # noqa: E402
from tests.support import ServerProcess, running_server  # noqa: E402

MODEL = ROOT.parent / "shared" / "models" / "tiny_math"
BAD_LINES = ("Traceback", "never retrieved", "was destroyed", "ERROR", "never awaited")
"""In a server's log; a calm one writes none of them."""


async def measured(
    args: argparse.Namespace, server: ServerProcess
) -> tuple[dict[str, Any], list[str]]:
    """Run one of the two against a server, within a bound of time."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for stop in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(stop, task.cancel)
    async with httpx.AsyncClient(timeout=60.0) as client, asyncio.timeout(args.bound_s):
        info = (await client.get(f"{server.url}/info")).json()
        bench = Bench(args, server, info, client, Watch(server.url, server.process.pid))
        return await (saturation if args.what == "saturation" else soak)(bench)


def log_faults(log: Path) -> list[str]:
    """Lines of a server's log that a calm one does not write."""
    lines = log.read_text(errors="replace").splitlines()
    return [f"log: {line[:300]}" for line in lines if any(bad in line for bad in BAD_LINES)][:20]


def main(args: argparse.Namespace) -> int:
    """Start the server, measure, stop it; 0 when all was well."""
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "server.log"
    chosen = ["--engine", args.engine, "--dtype", "float32", "--max-batch", str(args.max_batch)]
    chosen += ["--kv-cache-gib", str(args.kv_cache_gib)]
    print(f"{args.what}: {args.engine}, {args.model.name}; files in {args.out}", flush=True)
    try:
        with running_server(args.model, log, *chosen) as server:
            result, faults = asyncio.run(measured(args, server))
            pids = tree_of(server.process.pid)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return 130
    if args.what == "soak":
        soak_table(result)
    faults += log_faults(log)
    if server.process.returncode != 0:
        faults.append(f"the server ended with {server.process.returncode}")
    faults += [f"process {pid} outlived the server" for pid in pids if running(pid)]
    for fault in faults[:20]:
        print(f"FAULT {fault}")
    result = {"what": args.what, "engine": args.engine, "ok": not faults} | result
    print(json.dumps(_finite(result | {"faults": faults[:50]})))
    if not faults:
        shutil.rmtree(args.out)
    return 1 if faults else 0


def _finite(value: Any) -> Any:
    """The same without not-a-number, which JSON has not, and with fewer digits."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def arguments() -> argparse.Namespace:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("what", choices=["saturation", "soak"])
    parse.add_argument("--model", type=Path, default=MODEL)
    parse.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parse.add_argument("--max-batch", type=int, default=256)
    parse.add_argument("--kv-cache-gib", type=float, default=1.0)
    parse.add_argument(
        "--out", type=Path, default=None, help="for the log and wrong trees; removed if all is well"
    )
    parse.add_argument("--plan", default="6-6-6", help="saturation: the trees")
    parse.add_argument("--segment", type=int, default=30)
    parse.add_argument(
        "--seconds", type=float, default=30.0, help="saturation: each level, each round"
    )
    parse.add_argument(
        "--ramp", type=float, default=10.0, help="saturation: not counted, before them"
    )
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--minutes", type=float, default=10.0, help="soak")
    parse.add_argument("--times", type=float, default=2.0, help="soak: the capacity")
    parse.add_argument(
        "--compare", type=float, default=0.01, help="share of trees, with a plain pass"
    )
    parse.add_argument(
        "--check-s", type=float, default=300.0, help="most for checks after the load"
    )
    parse.add_argument("--seed", type=int, default=random.randrange(1 << 20))
    args = parse.parse_args()
    args.out = args.out or Path(tempfile.mkdtemp(prefix="spoke-load-"))
    levels = args.rounds * len(MULTIPLES) * (args.ramp + args.seconds + TAIL_S + SETTLE_S)
    soaking = 60 * args.minutes + args.check_s + 120
    args.bound_s = levels if args.what == "saturation" else soaking
    return args


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(arguments()))
