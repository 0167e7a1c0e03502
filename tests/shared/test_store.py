"""The weight store: durable bytes first, manifest last, nothing damaged ever handed out.

1. A version is visible when, and only when, its manifest is there.
2. A version is never written twice.
3. A truncated or changed file, a changed manifest, or another version's manifest is refused by name.
4. The digest of the weights depends on the tensors alone, not on files, order or version.
5. Of two who publish one version at the same moment one fails, and the other's version is whole.
6. A fetch that was cut short is gone on with; it takes no byte more than the manifest says.
7. A store that cannot be listed is away: it is not one that has less.

Each on a folder and on a fake S3, where it is not about one of the two; `test_object_store.py` is about S3.
"""

import errno
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from described import describe, tensor_entries, verify_tensors
from places import Place, place
from safetensors.numpy import save_file
from versions import Versions

from shared.errors import ConfigError, WeightsError
from shared.fsspec_store import FsspecStore
from shared.manifest import Manifest
from shared.new_files import NewFiles
from shared.store import MANIFEST

__all__ = ["place"]  # a fixture


def shard(folder: Path, name: str = "weights-00000.safetensors", scale: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3) * scale,
        "a": np.ones(4, np.float16),
    }
    save_file(tensors, path)
    return path


def store_with(place: Place, tmp_path: Path, version: int = 3) -> tuple[FsspecStore, Manifest]:
    store = FsspecStore(place.url, "run")
    path = shard(tmp_path / "made")
    manifest = describe([path], run="run", version=version, dtype="float32")
    store.publish(manifest, path.parent)
    return store, manifest


THREE = "run/v000003"


def test_what_is_published_is_fetched(place: Place, tmp_path: Path) -> None:
    store, manifest = store_with(place, tmp_path)
    assert store.versions() == [3]
    assert store.manifest(3) == manifest
    files = store.fetch(manifest, tmp_path / "fetched")
    verify_tensors(files, manifest)
    assert [f.read_bytes() for f in files] == [
        (tmp_path / "made" / f.name).read_bytes() for f in files
    ]


def test_a_store_in_memory_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FsspecStore(f"memory://{tmp_path.name}", "run")
    monkeypatch.setattr(store._fs, "blocksize", 16)
    path = shard(tmp_path / "made")
    manifest = describe([path], run="run", version=0, dtype="float32")
    moves: list[int] = []
    store.publish(manifest, path.parent, moved=lambda: moves.append(1))
    assert len(moves) > manifest.files[0].size // 16  # each part tells
    assert store.versions() == [0]
    verify_tensors(store.fetch(store.manifest(0), tmp_path / "fetched"), manifest)


def test_without_a_manifest_there_is_no_version(place: Place, tmp_path: Path) -> None:
    store, _ = store_with(place, tmp_path)
    place.delete(f"{THREE}/{MANIFEST}")
    assert store.versions() == []
    with pytest.raises(WeightsError, match=r"version 3 .* no readable manifest"):
        store.manifest(3)


def test_the_manifest_is_written_last(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that sees the manifest must find every byte that it names, whenever it looks."""
    store, reader = FsspecStore(place.url, "run"), FsspecStore(place.url, "run")
    path = shard(tmp_path / "made")
    manifest = describe([path], run="run", version=3, dtype="float32")
    seen: list[list[int]] = []
    put_file = store._fs.put_file

    def spying(source: str, target: str, **how: object) -> None:
        seen.append(reader.versions())
        put_file(source, target, **how)
        seen.append(reader.versions())

    monkeypatch.setattr(store._fs, "put_file", spying)
    store.publish(manifest, path.parent)
    assert seen == [[], []]
    assert reader.versions() == [3]


def test_a_version_is_never_written_twice(place: Place, tmp_path: Path) -> None:
    store, manifest = store_with(place, tmp_path)
    with pytest.raises(WeightsError, match=r"version 3 .* already"):
        store.publish(manifest, tmp_path / "made")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "bytes, not"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "other bytes"),
    ],
    ids=["truncated", "bit flipped"],
)
def test_damaged_files_are_refused(place: Place, tmp_path: Path, damage, reason: str) -> None:
    store, manifest = store_with(place, tmp_path)
    stored = f"{THREE}/{manifest.files[0].name}"
    place.write(stored, damage(place.read(stored)))
    with pytest.raises(WeightsError, match=reason):
        store.fetch(manifest, tmp_path / "fetched")
    assert not (tmp_path / "fetched" / manifest.files[0].name).exists()


def test_a_missing_file_is_refused(place: Place, tmp_path: Path) -> None:
    store, manifest = store_with(place, tmp_path)
    place.delete(f"{THREE}/{manifest.files[0].name}")
    with pytest.raises(WeightsError, match="version 3"):
        store.fetch(manifest, tmp_path / "fetched")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"version": 3', b'"version": 4', "digest does not match"),
        (b'"F32"', b'"F16"', "digest does not match"),
        (b"{", b"", "manifest of version 3"),
    ],
)
def test_a_changed_manifest_is_refused(
    place: Place, tmp_path: Path, old: bytes, new: bytes, reason: str
) -> None:
    store, _ = store_with(place, tmp_path)
    path = f"{THREE}/{MANIFEST}"
    place.write(path, place.read(path).replace(old, new, 1))
    with pytest.raises(WeightsError, match=reason):
        store.manifest(3)


def test_another_versions_manifest_is_refused(place: Place, tmp_path: Path) -> None:
    store, manifest = store_with(place, tmp_path)
    place.write(f"run/v000009/{MANIFEST}", manifest.encode())
    with pytest.raises(WeightsError, match="names run version 3"):
        store.manifest(9)


def test_a_manifest_cannot_point_outside_its_folder(place: Place, tmp_path: Path) -> None:
    _, manifest = store_with(place, tmp_path)
    evil = manifest.encode().replace(b'"weights-00000.safetensors"', b'"../../secret"')
    with pytest.raises(WeightsError, match=r"files\.0\.name"):
        Manifest.decode(evil, run="run", version=3)


def test_the_weights_digest_knows_tensors_alone(tmp_path: Path) -> None:
    one = describe([shard(tmp_path / "x")], run="run", version=3, dtype="float32")
    two = describe(
        [shard(tmp_path / "y", "other.safetensors")], run="b", version=7, dtype="float32"
    )
    changed = describe([shard(tmp_path / "z", scale=2)], run="run", version=3, dtype="float32")
    assert one.weights_digest == two.weights_digest
    assert one.digest != two.digest
    assert one.weights_digest != changed.weights_digest


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 4, struct.pack("<Q", 1 << 40) + b"{}", b"\x02" + b"\x00" * 7 + b"[]"]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        tensor_entries(path)


def test_deleting_leaves_nothing(place: Place, tmp_path: Path) -> None:
    store, _ = store_with(place, tmp_path)
    store.delete(3)
    store.delete(3)
    assert store.versions() == store.numbers() == []
    assert place.names() == set()


@pytest.mark.parametrize(
    ("url", "run"), [("nope://x", "run"), ("file:///tmp/x", "../up"), ("file:///tmp/x", "")]
)
def test_unusable_stores_are_named(url: str, run: str) -> None:
    with pytest.raises(ConfigError, match="weight store"):
        FsspecStore(url, run)


@pytest.mark.parametrize("same_names", [False, True], ids=["other names", "same names"])
def test_of_two_that_publish_one_version_one_fails(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_names: bool
) -> None:
    refused = of_two_one_fails(place.url, tmp_path, monkeypatch, same_names)
    assert ("another weights.safetensors" in refused) is same_names  # by the file, or the manifest
    assert not [name for name in place.names() if name.endswith(".partial")]


def test_in_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_two_one_fails(f"memory://{tmp_path / 'store'}", tmp_path, monkeypatch, same_names=False)


def of_two_one_fails(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_names: bool
) -> str:
    """What the one is told. Both have looked before one writes; and written before one makes the manifest."""
    both_looked, both_wrote = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)
    outcomes: dict[float, str] = {}

    put = NewFiles.put

    def late(self: NewFiles, *args, **kwargs) -> None:
        both_looked.wait()
        put(self, *args, **kwargs)

    monkeypatch.setattr(NewFiles, "put", late)

    def publish(scale: float) -> None:
        store = FsspecStore(url, "run")
        name = "weights.safetensors" if same_names else f"weights-{scale:.0f}.safetensors"
        path = shard(tmp_path / f"made-{scale}", name, scale)
        manifest = describe([path], run="run", version=3, dtype="float32")
        try:
            store.publish(manifest, path.parent, before_manifest=waits)
            outcomes[scale] = manifest.digest
        except WeightsError as error:
            outcomes[scale] = str(error)

    def waits() -> None:
        if not same_names:
            both_wrote.wait()

    threads = [threading.Thread(target=publish, args=(scale,)) for scale in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    store = FsspecStore(url, "run")
    winner = store.manifest(3)
    refused = [text for text in outcomes.values() if text != winner.digest]
    assert len(outcomes) == 2
    assert len(refused) == 1
    assert "in the store already" in refused[0]
    verify_tensors(store.fetch(winner, tmp_path / "fetched"), winner)
    return refused[0]


def test_a_file_of_a_trainer_that_died_is_never_written_over(place: Place, tmp_path: Path) -> None:
    store = FsspecStore(place.url, "run")
    path = shard(tmp_path / "made")
    left = f"{THREE}/{path.name}"
    place.write(left, b"half a shard")
    assert (store.versions(), store.numbers()) == ([], [3])
    manifest = describe([path], run="run", version=3, dtype="float32")
    with pytest.raises(WeightsError, match=r"another weights-00000\.safetensors .* take the next"):
        store.publish(manifest, path.parent)
    assert place.read(left) == b"half a shard"
    store.delete(3)
    assert store.numbers() == []
    store.publish(manifest, path.parent)
    assert store.numbers() == [3]


def test_what_a_trainer_that_died_had_put_is_gone_on_with(place: Place, tmp_path: Path) -> None:
    store = FsspecStore(place.url, "run")
    path = shard(tmp_path / "made")
    place.write(f"{THREE}/{path.name}", path.read_bytes())
    store.publish(describe([path], run="run", version=3, dtype="float32"), path.parent)
    assert store.versions() == [3]


def test_numbers_are_of_version_folders_alone(place: Place, tmp_path: Path) -> None:
    store, _ = store_with(place, tmp_path)
    for name in ("v000007", "v9", "v00000x", "other"):
        place.write(f"run/{name}/file", b"")
    assert store.numbers() == [3, 7]
    assert FsspecStore(place.url, "no-such-run").numbers() == []


def away(*args: object, **kwargs: object) -> None:
    """As a file system that is gone answers."""
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("call", ["ls", "info"])
def test_a_store_that_cannot_be_listed_is_away(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whoever collects would take what is left out for something half-written, and delete it."""
    store, _ = store_with(place, tmp_path)
    place.write("run/v000004", b"a file")
    assert store.versions() == [3]
    store.url = "sftp://host/store"
    monkeypatch.setattr(store._fs, call, away)
    with pytest.raises(
        WeightsError, match=r"sftp://host/store: run run cannot be listed: .* see that this machine"
    ):
        store.versions()
    if call == "ls":
        with pytest.raises(WeightsError, match="Input/output"):
            store.numbers()


def test_a_manifest_of_the_first_format_is_refused_by_its_number(
    place: Place, tmp_path: Path
) -> None:
    _, manifest = store_with(place, tmp_path)
    old = manifest.model_copy(update={"format": 1}).seal().encode()
    with pytest.raises(WeightsError, match="format 1, which this Spoke does not read"):
        Manifest.decode(old, run="run", version=3)


def test_a_part_is_gone_on_with(place: Place, tmp_path: Path) -> None:
    versions = Versions(tmp_path, url=place.url)
    versions.publish()
    manifest, folder = versions.manifests[0], tmp_path / "fetched"
    entry, stored = manifest.files[0], f"run/v000000/{manifest.files[0].name}"
    whole = place.read(stored)
    folder.mkdir()
    (folder / f"{entry.name}.part").write_bytes(whole[:1000])
    place.write(stored, b"?" * 1000 + whole[1000:])  # what is there is not asked for again
    paths = versions.store.fetch(manifest, folder, [entry])
    assert [path.read_bytes() for path in paths] == [whole]
    assert [path.name for path in folder.iterdir()] == [entry.name]


def test_a_wrong_part_is_fetched_anew(place: Place, tmp_path: Path) -> None:
    versions = Versions(tmp_path, url=place.url)
    versions.publish()
    manifest, folder = versions.manifests[0], tmp_path / "fetched"
    folder.mkdir()
    for entry, part in zip(manifest.files, (b"?" * 1000, b"?" * 10_000_000), strict=True):
        (folder / f"{entry.name}.part").write_bytes(part)
    versions.store.fetch(manifest, folder)
    assert {path.name for path in folder.iterdir()} == {entry.name for entry in manifest.files}


def test_no_byte_more_than_the_manifest_says_is_taken(place: Place, tmp_path: Path) -> None:
    versions = Versions(tmp_path, url=place.url)
    versions.publish()
    manifest = versions.manifests[0]
    stored = f"run/v000000/{manifest.files[0].name}"
    place.write(stored, place.read(stored) + bytes(50 << 20))
    with pytest.raises(WeightsError, match="has more than 300000 bytes"):
        versions.store.fetch(manifest, tmp_path / "fetched", manifest.files[:1])
    assert sum(path.stat().st_size for path in (tmp_path / "fetched").iterdir()) == 0


def test_a_shortcuts_files_are_fetched_alone(place: Place, tmp_path: Path) -> None:
    versions = Versions(tmp_path, url=place.url)
    versions.publish()
    versions.publish(anchor=True)
    manifest = versions.manifests[1]
    assert manifest.shortcut is not None
    paths = versions.store.fetch(manifest, tmp_path / "fetched", manifest.shortcut.files)
    assert [path.name for path in paths] == ["delta-0.zst"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own whose files may have 100 kB: the system refuses the rest of a shard."""
    versions = Versions(tmp_path)
    versions.publish()
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from shared.errors import RoomError\n"
        "from shared.fsspec_store import FsspecStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "store = FsspecStore(sys.argv[1], 'run')\n"
        "try: store.fetch(store.manifest(0), Path(sys.argv[2]))\n"
        "except RoomError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, versions.store.given, str(tmp_path / "fetched")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert "no room for weights-" in run.stdout
    assert "free some" in run.stdout
    assert list((tmp_path / "fetched").iterdir()) == []


def test_an_http_store_is_not_written_to() -> None:
    with pytest.raises(ConfigError, match="can only be read"):
        FsspecStore("http://host:8100", "run")


def test_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as error:
        FsspecStore("nope://me:secret@host/store", "run")
    assert "secret" not in str(error.value)
