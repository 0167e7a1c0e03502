"""A trainer as far as the fleet can see one: it holds the lease and publishes version after version.

It has the trainer's own `hold` and `Publisher`; only its weights come from a seeded generator and not of
gradients, a few elements of each tensor moved by one step of their format, as small learning rates do. It says
what it announced, with digests of its own tensors; what it is told makes it go on:

    publish        the next version, waited for until it is announced
    quit           gives the lease back and ends

With `--die-at files` or `--die-at manifest` it stands still for ever at that place of its second version, says so
and waits to be killed.
"""

import argparse
import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from faults.clock import skew

from shared.coordination import RedisCoordinator
from shared.errors import SpokeError
from shared.fsspec_store import FsspecStore
from trainer.lease import hold
from trainer.policy import load_policy, state_tensors
from trainer.publish import Publisher

WORDS: list[Any] = []
"""The end of the pipe that it speaks into."""


def say(**fields: Any) -> None:
    WORDS[0].send(fields)


def moved(tensors: dict[str, torch.Tensor], version: int, share: float) -> dict[str, torch.Tensor]:
    """The weights of a version: a share of the elements differs by one step of the number format."""
    found = {}
    for name, tensor in tensors.items():
        draw = torch.Generator().manual_seed(hash_of(f"{version}/{name}"))
        bits = tensor.clone().view(torch.int16)
        chosen = torch.rand(bits.shape, generator=draw) < share
        finite = tensor.float().abs() > 1e-6  # one step from zero would be a denormal
        bits[chosen & finite] ^= 1
        found[name] = bits.view(tensor.dtype)
    return found


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by torch alone and not by the code under test."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


class StopsInside(FsspecStore):
    """A store in whose `publish` the process stands still for ever: the moment in which a test kills it."""

    at = ""

    def publish(self, manifest: Any, folder: Path, **rest: Any) -> None:
        if (
            manifest.base_version is None and not manifest.shortcut
        ):  # the first version goes through
            super().publish(manifest, folder, **rest)
            return
        before = rest.pop("before_manifest")

        def stand() -> None:
            if self.at == "manifest":
                self._stand(manifest.version)
            before()

        if self.at == "files":
            target = (
                Path(self.url.removeprefix("file://")) / manifest.run / f"v{manifest.version:06d}"
            )
            target.mkdir()
            (target / manifest.files[0].name).write_bytes(b"half")
            self._stand(manifest.version)
        super().publish(manifest, folder, before_manifest=stand, **rest)

    def _stand(self, version: int) -> None:
        say(stands=self.at, version=version)
        time.sleep(600)


def main(argv: list[str], orders: Any, words: Any) -> None:
    """The process.

    Args:
        argv: arguments.
        orders: pipe that says what to do.
        words: pipe that takes what happened.
    """
    WORDS.append(words)
    args = arguments(argv)
    if args.skew:
        skew(args.skew)
    asyncio.run(lead(args, orders))


def arguments(argv: list[str]) -> argparse.Namespace:
    parse = argparse.ArgumentParser()
    for name in ("redis-url", "run", "store", "model"):
        parse.add_argument(f"--{name}", required=True)
    parse.add_argument("--store-url", help="how servers reach the store, where it is not --store")
    parse.add_argument("--share", type=float, default=0.003)
    parse.add_argument("--anchor-every", type=int, default=10)
    parse.add_argument("--max-staleness", type=int, default=1)
    parse.add_argument("--keep", type=int, default=3)
    parse.add_argument("--wait", type=float, default=60)
    parse.add_argument("--die-at", default="")
    parse.add_argument("--skew", type=Path, help="folder of `faulty_server`'s file `offset`")
    return parse.parse_args(argv)


async def lead(args: argparse.Namespace, orders: Any) -> None:
    torch.set_num_threads(1)
    tensors = state_tensors(load_policy(args.model, torch.bfloat16), torch.bfloat16)
    coordinator = RedisCoordinator(args.redis_url, args.run)
    store = StopsInside(args.store, args.run) if args.die_at else FsspecStore(args.store, args.run)
    if isinstance(store, StopsInside):
        store.at = args.die_at
    try:
        async with hold(
            coordinator, store.versions, args.run,
            lambda text: say(status=text),
        ) as lease:  # fmt: skip
            publisher = Publisher(
                store=store, store_url=args.store_url or args.store, coordinator=coordinator, lease=lease,
                run=args.run, dtype="bfloat16", keep=args.keep, anchor_every=args.anchor_every,
                max_staleness=args.max_staleness, wait_s=args.wait, status=lambda text: say(status=text),
            )  # fmt: skip
            version = await publisher.next_version()
            say(leads=True, next=version)
            while await asyncio.to_thread(orders.recv) == "publish":
                tensors = moved(tensors, version, args.share)
                expected = digests(tensors)
                say(begins=version, tensors=expected)  # whoever kills us wants to know what we had
                head = await publisher.publish(version, tensors)
                (report,) = publisher.reports()
                say(
                    version=version, weights_digest=head.weights_digest, tensors=expected,
                    bytes=report.stored_bytes, anchor=report.anchor,
                )  # fmt: skip
                await publisher.collect(version)
                version += 1
            await publisher.close()
    except SpokeError as error:
        say(ended=f"{type(error).__name__}: {error}")
    finally:
        await coordinator.close()
