"""`spoke push` where no server follows: what it stores, deletes and announces. With servers: tests/integration."""

import asyncio
import uuid
from pathlib import Path

import pytest

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
