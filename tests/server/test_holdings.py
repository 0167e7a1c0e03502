"""What a server holds on its disk.

1. A version is held from the moment that its manifest is written, which is last; a process that starts again finds
   it, and hashes it before it uses it.
2. Of a chain that misses a file or has another base there is none.
3. Pruning leaves the newest chain whole.
4. Another manifest of a held version is adopted: what both name is not fetched again, and nothing else is left.
"""

import shutil
from pathlib import Path

import pytest
from versions import RUN, Versions

from server.holdings import Holdings
from shared.errors import ConfigError, WeightsError
from shared.manifest import FileEntry, Manifest
from shared.sources import Part
from shared.store import MANIFEST


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    """Anchors at 0 and 3, the latter with a shortcut; deltas else, up to 5."""
    made = Versions(tmp_path)
    for version in range(6):
        made.publish(anchor=version == 3)
    return made


@pytest.fixture
def holdings(tmp_path: Path):
    opened = Holdings(tmp_path / "held", RUN)
    yield opened
    opened.close()


def take(holdings: Holdings, versions: Versions, version: int, *, full: bool = False) -> None:
    manifest = versions.manifests[version]
    files = manifest.files if full or manifest.delta is None else manifest.delta.files
    put(holdings, versions, manifest, files)
    holdings.add(manifest, files)


def put(
    holdings: Holdings, versions: Versions, manifest: Manifest, files: tuple[FileEntry, ...]
) -> None:
    versions.store.fetch(manifest, holdings.incoming(manifest), files)


def chain(holdings: Holdings, version: int) -> list[int] | None:
    found = holdings.chain(version)
    return found and [held.manifest.version for held in (found.anchor, *found.deltas)]


def test_chains_begin_at_the_newest_anchor_that_is_whole(
    holdings: Holdings, versions: Versions
) -> None:
    for version in range(5):
        take(holdings, versions, version)
    assert holdings.versions() == (0, 1, 2, 3, 4)
    assert chain(holdings, 4) == [0, 1, 2, 3, 4]
    assert chain(holdings, 5) is None
    found = holdings.chain(4)
    assert found is not None
    assert found.manifest == versions.manifests[4]
    take(holdings, versions, 3, full=True)
    assert chain(holdings, 4) == [3, 4]


def test_there_is_no_chain_over_a_gap(holdings: Holdings, versions: Versions) -> None:
    for version in (0, 1, 3, 4):
        take(holdings, versions, version)
    assert chain(holdings, 1) == [0, 1]
    assert chain(holdings, 4) is None


def test_there_is_no_chain_onto_other_weights(
    holdings: Holdings, versions: Versions, tmp_path: Path
) -> None:
    other = Versions(tmp_path / "other", branch="other")
    other.publish()
    other.publish()
    take(holdings, other, 0)
    take(holdings, versions, 1)
    assert chain(holdings, 1) is None
    take(holdings, versions, 0)  # in its place
    assert chain(holdings, 1) == [0, 1]


def test_a_new_process_finds_what_was_held(
    holdings: Holdings, versions: Versions, tmp_path: Path
) -> None:
    for version in range(3):
        take(holdings, versions, version)
    put(
        holdings, versions, versions.manifests[3], versions.manifests[3].files
    )  # killed before `add`
    with pytest.raises(ConfigError, match="another server"):
        Holdings(tmp_path / "held", RUN)
    holdings.close()
    again = Holdings(tmp_path / "held", RUN)
    assert chain(again, 2) == [0, 1, 2]
    assert again.versions() == (0, 1, 2)
    again.close()


@pytest.mark.parametrize("damage", ["file", "missing", "manifest"])
def test_what_was_damaged_meanwhile_is_not_used(
    holdings: Holdings, versions: Versions, tmp_path: Path, damage: str
) -> None:
    for version in range(3):
        take(holdings, versions, version)
    holdings.close()
    file = holdings.folder_of(1) / "delta-0.zst"
    data = file.read_bytes()
    if damage == "file":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "missing":
        file.unlink()
    else:
        (file.parent / MANIFEST).write_text("{")
    again = Holdings(tmp_path / "held", RUN)
    assert chain(again, 0) == [0]
    assert chain(again, 2) is None
    assert again.file(1, file.name) is None
    take(again, versions, 1)  # and is mended by another fetch
    assert chain(again, 2) == [0, 1, 2]
    again.close()


def test_pruning_keeps_the_chain(holdings: Holdings, versions: Versions) -> None:
    for version in range(5):
        take(holdings, versions, version)
    holdings.prune(4)
    assert holdings.versions() == (0, 1, 2, 3, 4)
    take(holdings, versions, 3, full=True)
    holdings.prune(9)  # not held: nothing is known to be needless
    assert holdings.versions() == (0, 1, 2, 3, 4)
    holdings.prune(4)
    assert holdings.versions() == (3, 4)
    assert not holdings.folder_of(0).exists()
    assert chain(holdings, 4) == [3, 4]


def test_an_anchor_is_completed_with_the_right_shards_alone(
    holdings: Holdings, versions: Versions, tmp_path: Path
) -> None:
    for version in range(4):
        take(holdings, versions, version)
    written = shutil.copytree(versions.folder(3), tmp_path / "written")
    shards = sorted(written.glob("weights-*"))
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-1])
    with pytest.raises(WeightsError, match=r"weights-1\.safetensors was written here"):
        holdings.complete(3, shards)
    assert chain(holdings, 3) == [0, 1, 2, 3]
    shards[1].write_bytes(data)
    holdings.complete(3, shards)
    assert chain(holdings, 3) == [3]


def test_peers_get_held_files_alone(holdings: Holdings, versions: Versions) -> None:
    take(holdings, versions, 0)
    put(holdings, versions, versions.manifests[1], versions.manifests[1].files)
    for name in ("weights-0.safetensors", "weights-1.safetensors", MANIFEST):
        path = holdings.file(0, name)
        assert path is not None
        assert path.is_file()
    for name in ("nothing", "../v000000/manifest.json", ".lock", "delta-0.zst", ""):
        assert holdings.file(0, name) is None
    assert holdings.file(1, MANIFEST) is None  # not added yet
    assert holdings.file(1, "delta-0.zst") is None


def test_what_is_abandoned_leaves_no_bytes(holdings: Holdings, versions: Versions) -> None:
    take(holdings, versions, 0)
    manifest = versions.manifests[1]
    (holdings.incoming(manifest) / "delta-0.zst.part").write_bytes(bytes(1000))
    holdings.abandon(1)
    assert not holdings.folder_of(1).exists()
    (holdings.folder_of(0) / "x.part").write_bytes(b"x")
    holdings.abandon(0)
    assert chain(holdings, 0) == [0]
    assert not (holdings.folder_of(0) / "x.part").exists()


def test_a_forgotten_version_is_gone(holdings: Holdings, versions: Versions) -> None:
    for version in range(3):
        take(holdings, versions, version)
    holdings.forget(1)
    holdings.forget(1)
    assert holdings.versions() == (0, 2)
    assert chain(holdings, 2) is None


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--weights-dir"):
        Holdings(tmp_path / "file", RUN)


def test_another_manifest_of_a_held_version_keeps_what_both_name(
    holdings: Holdings, versions: Versions, tmp_path: Path
) -> None:
    take(holdings, versions, 0)
    take(holdings, versions, 1)
    before = versions.manifests[0]
    later = before.model_copy(update={"created_at": "later"}).seal()
    holdings.adopt(later)
    found = holdings.chain(1)
    assert found is not None
    assert (found.anchor.manifest, chain(holdings, 1)) == (later, [0, 1])
    first, second = later.files
    other = second.model_copy(update={"sha256": "0" * 64})
    holdings.adopt(later.model_copy(update={"files": (first, other)}).seal())
    assert chain(holdings, 0) is None
    folder = holdings.folder_of(0)
    assert {path.name for path in folder.iterdir()} == {first.name, MANIFEST}
    holdings.close()
    reopened = Holdings(tmp_path / "held", RUN)
    manifest = reopened.manifest(0)
    assert manifest is not None
    assert manifest.files == (first, other)
    assert reopened.file(0, first.name) is not None
    reopened.close()


def test_a_version_that_is_not_held_is_not_adopted(holdings: Holdings, versions: Versions) -> None:
    holdings.adopt(versions.manifests[0])
    assert holdings.manifest(0) is None


def test_others_are_told_of_what_they_can_be_given(
    holdings: Holdings, versions: Versions, tmp_path: Path
) -> None:
    for version in range(4):
        take(holdings, versions, version)
    deltas = {(version, Part.DELTA) for version in (1, 2, 3)}
    assert holdings.parts() == deltas | {(0, Part.FULL)}  # version 3 is an anchor, by its shortcut
    shutil.copytree(versions.folder(3), tmp_path / "written")
    holdings.complete(3, sorted((tmp_path / "written").glob("weights-*")))
    assert holdings.parts() == deltas | {(0, Part.FULL), (3, Part.FULL)}
    holdings.close()
    (holdings.folder_of(3) / "weights-1.safetensors").unlink()
    (holdings.folder_of(1) / "delta-0.zst").unlink()
    again = Holdings(tmp_path / "held", RUN)
    assert again.parts() == {(0, Part.FULL), (2, Part.DELTA), (3, Part.DELTA)}
    assert again.versions() == (0, 2, 3)
    again.close()
