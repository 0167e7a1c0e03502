"""A weight store on S3: what is special about object stores, and everything that may go wrong with one.

The S3 is a fake (moto's emulator) on a real socket, behind a line that can be disturbed.

1. What another process wrote is seen at once; what a listing does not say is not believed.
2. Whatever fails is a WeightsError that names the store and the remedy, and that is tried again like any other
   store that is away. Nothing is made but the files of the version: no bucket.
3. A store that is away, refuses or says nothing costs a bounded number of requests and seconds.
4. An answer that was lost is no second author.
5. Files go and come in parts: memory is bounded, and a fetch goes on with the part that was cut.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_s3 import DENIED, SLOW_DOWN, FakeS3, Line, line_to
from places import Bucket, bucket
from s3fs import S3FileSystem
from support import free_port
from versions import RUN, Versions, noise

from shared import file_system, new_files
from shared.errors import ConfigError, WeightsError
from shared.fsspec_store import _BLOCK, FsspecStore
from shared.manifest import Manifest
from shared.receiving import PIECE
from shared.store import MANIFEST


@pytest.fixture
def place(fake_s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    S3FileSystem.clear_instance_cache()  # each has its endpoint from the environment
    yield bucket(fake_s3, monkeypatch)
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def two_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses than between three."""
    monkeypatch.setattr(file_system, "TRIES", 2)


@pytest.fixture
def line(place: Bucket, fake_s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    with line_to(fake_s3.url) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def copied(versions: Versions, place: Bucket) -> None:
    """A version's files as another process puts them: this one's file system does not know of it."""
    for file in sorted(versions.root.rglob("*"), key=lambda path: path.name == MANIFEST):
        if file.is_file():
            place.write(str(file.relative_to(versions.root)), file.read_bytes())


def test_what_another_process_wrote_is_seen_at_once(place: Bucket, tmp_path: Path) -> None:
    versions, reader = Versions(tmp_path), FsspecStore(place.url, RUN)
    assert (reader.numbers(), reader.versions()) == ([], [])
    for version in range(2):
        with pytest.raises(WeightsError, match=rf"version {version} .* no readable manifest"):
            reader.manifest(version)
        versions.publish(anchor=True)
        copied(versions, place)
        # What fsspec would remember of the version before, if it were let.
        assert len(reader._fs.ls(f"{place.bucket}/store/{RUN}")) == version + 1
        assert reader.numbers() == reader.versions() == list(range(version + 1))
        manifest = reader.manifest(version)
        assert manifest == versions.manifests[version]
        reader.fetch(manifest, tmp_path / f"{version}")
    place.delete(f"{RUN}/v000000/{MANIFEST}")
    assert (reader.numbers(), reader.versions()) == ([0, 1], [1])


def everything(store: FsspecStore, versions: Versions, folder: Path) -> list[Callable[[], object]]:
    """Each thing that a store is asked for."""
    manifest = versions.manifests[0]
    return [
        store.numbers,
        store.versions,
        lambda: store.manifest(0),
        lambda: store.fetch(manifest, folder / "fetched"),
        lambda: store.publish(manifest, versions.made / "0"),
        lambda: store.delete(0),
    ]


def fails(call: Callable[[], object], url: str, reason: str) -> None:
    with pytest.raises(WeightsError) as error:
        call()
    assert url in str(error.value)
    assert reason in str(error.value)
    assert isinstance(error.value.__cause__, OSError)  # by this it is known for one to try again


def test_without_credentials_it_says_so_until_there_are_some(
    place: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(found))
    versions = Versions(tmp_path)
    versions.publish()
    store = FsspecStore(place.url, RUN)
    for call in everything(store, versions, tmp_path):
        fails(call, place.url, "Unable to locate credentials; see which credentials this process")
    found.write_text("[default]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    store.publish(versions.manifests[0], versions.made / "0")
    assert store.versions() == [0]


def test_a_bucket_that_is_not_there_is_not_made(
    place: Bucket, fake_s3: FakeS3, tmp_path: Path
) -> None:
    versions, url = Versions(tmp_path), "s3://no-such-bucket/store"
    versions.publish()
    store = FsspecStore(url, RUN)
    numbers, listed, manifest, fetch, publish, _ = everything(store, versions, tmp_path)
    for call in (numbers, listed, manifest, fetch, publish):
        fails(call, url, "does not exist" if call is not fetch else "")
    for call in (numbers, listed, publish):
        fails(call, url, "make the bucket, or correct the URL")
    assert b"no-such-bucket" not in fake_s3.ask("GET", "")


@pytest.mark.usefixtures("two_tries")
def test_a_store_that_is_away_says_so(
    place: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    versions = Versions(tmp_path)
    versions.publish()
    for call in everything(FsspecStore(place.url, RUN), versions, tmp_path):
        fails(call, place.url, "see that this machine reaches the store")


@pytest.mark.usefixtures("two_tries")
@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (SLOW_DOWN, "reduce your request rate.; the store has too much to do: try again later"),
        (DENIED, "see which credentials this process finds, and what they may do there"),
    ],
    ids=["slow down", "denied"],
)
def test_a_refusal_says_what_to_do(
    place: Bucket, line: Line, tmp_path: Path, refusal: tuple[int, str, str], reason: str
) -> None:
    versions = Versions(tmp_path)
    versions.publish()
    store = FsspecStore(place.url, RUN)
    line.refusal = refusal
    for call in everything(store, versions, tmp_path):
        line.refuse, before = -1, len(line.requests)
        if call.__name__ in ("numbers", "versions", "publish"):
            fails(call, place.url, reason)
        else:
            fails(call, place.url, "")
        assert len(line.requests) - before <= file_system.TRIES * 4  # of four files at once
        line.refuse = 1 if refusal is SLOW_DOWN else 0
        store.numbers()


@pytest.mark.usefixtures("two_tries")
def test_a_store_that_says_nothing_has_a_bound(
    place: Bucket, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_system, "STALL_S", 0.2)
    versions = Versions(tmp_path)
    versions.publish()
    store = FsspecStore(place.url, RUN)
    line.silent = True
    for call in everything(store, versions, tmp_path):
        before = len(line.requests)
        fails(call, place.url, "see that this machine reaches the store")
        assert len(line.requests) - before <= file_system.TRIES * 4


@pytest.mark.parametrize("name", ["weights-0.safetensors", MANIFEST])
def test_an_answer_that_was_lost_is_no_second_author(
    place: Bucket, line: Line, tmp_path: Path, name: str
) -> None:
    versions = Versions(tmp_path)
    versions.publish()
    manifest, store = versions.manifests[0], FsspecStore(place.url, RUN)
    line.deaf_to = name
    refused = pytest.raises(WeightsError, match="in the store already")
    # The publisher then asks whose it is (tests/integration/test_object_store.py).
    with refused if name == MANIFEST else contextlib.nullcontext():
        store.publish(manifest, versions.made / "0")
    assert line.count("PUT", name) == 2
    assert store.manifest(0) == manifest
    store.fetch(manifest, tmp_path / "fetched")


def big(tmp_path: Path, place: Bucket, size: int) -> tuple[FsspecStore, Manifest, Path]:
    versions = Versions(tmp_path, shards=(size,))
    versions.publish()
    return FsspecStore(place.url, RUN), versions.manifests[0], versions.made / "0"


def test_files_go_and_come_in_parts(place: Bucket, line: Line, tmp_path: Path) -> None:
    store, manifest, made = big(tmp_path, place, 40 << 20)
    moves: list[int] = []
    store.publish(manifest, made, moved=lambda: moves.append(1))
    assert len(moves) >= 3  # each part is told of
    assert new_files.PART <= line.largest <= new_files.PART + (1 << 20)
    line.largest = 0
    (path,) = store.fetch(manifest, tmp_path / "fetched")
    assert path.read_bytes() == noise(40 << 20, "0 0")
    assert _BLOCK <= line.largest <= 2 * _BLOCK


def test_a_fetch_goes_on_with_what_was_cut(place: Bucket, line: Line, tmp_path: Path) -> None:
    store, manifest, made = big(tmp_path, place, 30 << 20)
    store.publish(manifest, made)
    asked = len(line.requests)

    def begins() -> list[int]:
        ranges = [span for _, path, span in line.requests[asked:] if "weights-0" in path and span]
        return [int(span.removeprefix("bytes=").partition("-")[0]) for span in ranges]

    folder = tmp_path / "fetched"
    store.fetch(manifest, tmp_path / "whole")
    line.cut_at = cut = begins()[2]
    with pytest.raises(WeightsError, match=f"weights-0.safetensors from {place.url}: "):
        store.fetch(manifest, folder)
    part = (folder / "weights-0.safetensors.part").stat().st_size
    assert part >= cut - PIECE, "nothing of what came before is lost"
    asked = len(line.requests)
    store.fetch(manifest, folder)
    assert min(begins()) == part


def test_many_threads_ask_at_once(place: Bucket, tmp_path: Path) -> None:
    """s3fs works in one thread of its own; ours come and go."""
    versions = Versions(tmp_path, url=place.url)
    for _ in range(3):
        versions.publish(anchor=True)
    failed: list[BaseException] = []

    def work(n: int) -> None:
        try:
            store = FsspecStore(place.url, RUN)
            assert store.versions() == [0, 1, 2]
            store.fetch(store.manifest(n % 3), tmp_path / f"fetched-{n}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert len({id(FsspecStore(place.url, RUN)._fs) for _ in range(3)}) == 1, "one set of clients"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://", "write s3://BUCKET"),
        ("s3://My_Bucket!/store", "letters, digits"),
        ("s3://key:secret@bucket/store", "credentials in the env"),
    ],
)
def test_unusable_urls_are_named(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        FsspecStore(url, RUN)
    assert "secret" not in str(error.value)


def test_what_the_user_configured_for_fsspec_stays(
    place: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 60}})
    fs = FsspecStore(place.url, RUN)._fs
    assert fs.config_kwargs["read_timeout"] == 60
    assert fs.config_kwargs["retries"]["total_max_attempts"] == file_system.TRIES
