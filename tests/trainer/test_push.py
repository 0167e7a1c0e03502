"""`spoke push` where no server follows: what it stores, deletes and announces. With servers: tests/integration."""

import asyncio
import shutil
import uuid
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.chain import Chain, Held, write_full
from shared.coordination import RedisCoordinator
from shared.fleet import Head, ServerRecord, ServerState
from shared.fsspec_store import FsspecStore
from trainer.cli import main

SECRET = "sftp://me:secret@host/store"


async def in_redis(url: str, run: str, *records: ServerRecord) -> Head | None:
    redis = RedisCoordinator(url, run)
    for record in records:
        await redis.report(record)
    try:
        return await redis.head()
    finally:
        await redis.close()


def record(version: int) -> ServerRecord:
    """Of a server that takes no trees, and is not waited for."""
    return ServerRecord(
        server_id="s", url="http://x", state=ServerState.STALE, version=version, digest="w", model="m",
        engine="transformers", updated_at=0.0,
    )  # fmt: skip


def test_old_versions_go_and_what_a_server_needs_stays(
    redis_url: str, tiny_math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"test-{uuid.uuid4().hex}"
    where = ["--run", run, "--redis-url", redis_url]
    store = f"file://{tmp_path / 'store'}"
    push = ["push", str(tiny_math), *where, "--store", store, "--advertise-store", "s3://bucket/a"]
    for kept in ([0], [0, 1], [0, 1, 2], [1, 2, 3]):
        assert main(push) == 0
        assert FsspecStore(store, run).versions() == kept
    asyncio.run(in_redis(redis_url, run, record(3)))
    main([*push, "--keep-versions", "1"])  # exit code 1: a server has not followed
    assert FsspecStore(store, run).versions() == [3, 4]
    head = asyncio.run(in_redis(redis_url, run))
    assert head is not None
    assert (head.version, head.store) == (4, "s3://bucket/a")
    assert main([*push, "--keep-versions", "0"]) == 2
    assert "--keep-versions 0: at least 1" in capsys.readouterr().err


def test_no_password_is_announced_or_shown(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"test-{uuid.uuid4().hex}"
    where = ["--run", run, "--redis-url", redis_url]
    assert main(["push", str(tmp_path), *where, "--store", SECRET]) == 2
    assert "give --advertise-store its URL without" in capsys.readouterr().err
    assert asyncio.run(in_redis(redis_url, run)) is None

    async def older() -> None:
        """A head of before this was refused."""
        redis = RedisCoordinator(redis_url, run)
        await redis.restore(Head(version=1, manifest_digest="m", weights_digest="w", store=SECRET))
        await redis.close()

    asyncio.run(older())
    assert main(["fleet", *where]) == 0
    said = capsys.readouterr().out
    assert "version 1 in sftp://host/store" in said
    assert "secret" not in said


def moved(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint in which a few weights are the next float."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(torch.int32).view(-1)[::1000] += 1
    file.unlink()  # the copy is as read-only as the original
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_push_with_its_base_sends_what_changed_and_is_exact(
    redis_url: str, tiny_math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = f"test-{uuid.uuid4().hex}", tmp_path / "store"
    where = ["--run", run, "--redis-url", redis_url, "--store", str(store), "--keep-versions", "1"]
    models = [tiny_math]
    for number in range(1, 4):
        models.append(moved(models[-1], tmp_path / f"step{number}"))
    assert main(["push", str(models[0]), *where]) == 0
    assert "all weights, " in capsys.readouterr().out
    for before, after in pairwise(models):
        assert main(["push", str(after), *where, "--base", str(before)]) == 0
        assert "a delta of " in capsys.readouterr().out
    opened = FsspecStore(str(store), run)
    assert opened.versions() == [0, 1, 2, 3], "what the newest builds upon stays"
    held = []
    for number in range(4):
        manifest = opened.manifest(number)
        assert manifest.is_anchor == (number == 0)
        opened.fetch(manifest, tmp_path / f"v{number}")
        held.append(Held(manifest=manifest, folder=tmp_path / f"v{number}"))
    shards = write_full(Chain(anchor=held[0], deltas=tuple(held[1:])), tmp_path / "full")
    expected = load_file(models[3] / "model.safetensors")
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert found.keys() <= expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_base_that_does_not_hold_is_refused_and_nothing_is_pushed(
    redis_url: str, tiny_math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = f"test-{uuid.uuid4().hex}", tmp_path / "store"
    where = ["--run", run, "--redis-url", redis_url, "--store"]
    other = moved(tiny_math, tmp_path / "other")
    push = ["push", str(other), *where]

    def refused(*arguments: str) -> str:
        assert main([*push, *arguments]) == 2
        return capsys.readouterr().err

    assert "no version yet; leave --base out" in refused(str(store), "--base", str(tiny_math))
    assert main(["push", str(tiny_math), *where, str(store)]) == 0
    said = refused(str(store), "--base", str(other))
    assert "not those of version 0, the run's newest; give the checkpoint" in said
    assert "give --dtype float32" in refused(
        str(store), "--base", str(tiny_math), "--dtype", "bfloat16"
    )
    said = refused(str(tmp_path / "elsewhere"), "--base", str(tiny_math))
    assert "leave --base out" in said
    assert FsspecStore(str(store), run).numbers() == [0]
    head = asyncio.run(in_redis(redis_url, run))
    assert head is not None
    assert head.version == 0
