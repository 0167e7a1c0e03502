"""A bucket between trainer and servers: whole processes, and a fake S3 on a real socket.

1. A server that knows the bucket by the run's head alone follows it, to the bit, by anchors and deltas. While the
   bucket refuses it serves on and says why; then it takes what it missed.
2. A trainer waits for a bucket that is away, and an answer that was lost counts.
3. `spoke push` publishes into a bucket and deletes there what nobody needs.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from fake_s3 import FakeS3, Line, credentials, line_to
from s3fs import S3FileSystem
from safetensors.torch import load_file
from support import running_server

from shared.coordination import RedisCoordinator
from shared.fleet import ServerState
from shared.fsspec_store import FsspecStore
from shared.store import MANIFEST
from tests.integration.test_following import assert_holds
from tests.server.weight_run import Run
from trainer.cli import main
from trainer.lease import hold
from trainer.publish import Publisher


@pytest.fixture
def line(fake_s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """To the fake S3, for what this process starts."""
    S3FileSystem.clear_instance_cache()  # each has its endpoint from the environment
    with line_to(fake_s3.url) as found:
        for name, value in credentials(found.url).items():
            monkeypatch.setenv(name, value)
        yield found
    S3FileSystem.clear_instance_cache()


async def test_a_server_follows_a_bucket(
    line: Line,
    fake_s3: FakeS3,
    tiny_math: Path,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = f"s3://{fake_s3.bucket()}/weights"
    tensors = load_file(tiny_math / "model.safetensors")
    run = Run(tmp_path, redis_url, tensors, store)
    arguments = [
        "--engine", "transformers", "--dtype", "float32", "--redis-url", redis_url, "--run", run.name,
        "--no-peers", "--max-model-len", "256",
    ]  # fmt: skip
    first = await run.publish()
    assert first.store == store
    try:
        with running_server(tiny_math, tmp_path / "server.log", *arguments) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", fake_s3.url)  # the line is the server's alone
            S3FileSystem.clear_instance_cache()
            run.store = FsspecStore(store, run.name)
            async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
                await assert_holds(client, run, first, how="full")
                await assert_holds(client, run, await run.publish(), how="patch")
                await assert_holds(client, run, await run.publish(3, anchor=True), how="patch")
                line.refuse = -1
                missed = await run.publish(2)
                stale = await run.record(
                    lambda r: r.state is ServerState.STALE and bool(r.last_error)
                )
                assert stale.last_error is not None
                assert store in stale.last_error
                assert "the store has too much to do" in stale.last_error
                line.refuse = 0
                await assert_holds(client, run, missed, how="patch")
    finally:
        await run.coordinator.close()


async def test_a_trainer_waits_for_a_bucket_and_knows_its_own_version(
    line: Line, fake_s3: FakeS3, redis_url: str
) -> None:
    name = f"test-{uuid.uuid4().hex}"
    store = FsspecStore(f"s3://{fake_s3.bucket()}/weights", name)
    redis, said = RedisCoordinator(redis_url, name), list[str]()

    def status(text: str) -> None:
        said.append(text)
        line.refuse = 0  # it is back

    weights = {"a": torch.randn(64, 32).bfloat16()}
    try:
        async with hold(redis, store.versions, name, said.append) as lease:
            publisher = Publisher(
                store=store, store_url=store.url, coordinator=redis, lease=lease, run=name,
                dtype="bfloat16", status=status,
            )  # fmt: skip
            line.refuse = -1
            await publisher.publish(0, weights)
            assert len(said) == 1
            assert said[0].startswith(f"version 0 waits: weight store {store.url}: version 0: ")
            line.deaf_to = MANIFEST
            changed = {"a": weights["a"].clone()}
            changed["a"][3, 4] += 1
            head = await publisher.publish(1, changed)
            assert line.count("PUT", f"v000001/{MANIFEST}") == 2
            assert store.manifest(1).digest == head.manifest_digest
            assert len(said) == 1
        assert await redis.head() == head
    finally:
        await redis.close()


@pytest.mark.usefixtures("line")
def test_push_publishes_into_a_bucket(fake_s3: FakeS3, tiny_math: Path, redis_url: str) -> None:
    run, store = f"test-{uuid.uuid4().hex}", f"s3://{fake_s3.bucket()}/weights"
    push = ["push", str(tiny_math), "--run", run, "--redis-url", redis_url, "--store", store]
    for kept in ([0], [0, 1], [1, 2]):
        assert main([*push, "--keep-versions", "2"]) == 0
        assert FsspecStore(store, run).versions() == FsspecStore(store, run).numbers() == kept


def test_push_into_no_bucket_says_what_to_do(
    line: Line, tiny_math: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = f"test-{uuid.uuid4().hex}", "s3://no-such-bucket/weights"
    code = main(["push", str(tiny_math), "--run", run, "--redis-url", redis_url, "--store", store])
    assert code != 0
    assert f"weight store {store}: run {run} cannot be listed" in (said := capsys.readouterr().err)
    assert "make the bucket, or correct the URL" in said
    assert not line.count("PUT", "")
