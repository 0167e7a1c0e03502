"""What a server rebuilds for itself, so that a long chain is not decoded from its anchor each time.

1. A version comes out the same from there as from the anchor, to the byte, over many versions.
2. It is one version's, a recent one's, and nobody else sees it; a new process does not know it.
3. An anchor that is newer ends it. A disk that is nearly full is left alone.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import rebuilt
from server.holdings import Holdings
from shared.chain import Chain, write_full, write_patch
from shared.errors import WeightsError
from tests.shared.versions import anchor, chain, moved

FIRST = 3
"""Version of the chain's anchor."""
LENGTH = 9


@pytest.fixture
def made(tmp_path: Path) -> Chain:
    """An anchor and its deltas, as they lie in a store."""
    return chain(tmp_path / "store", LENGTH)[0]


@pytest.fixture
def holdings(tmp_path: Path) -> Iterator[Holdings]:
    opened = Holdings(tmp_path / "held", "run")
    yield opened
    opened.close()


def take(holdings: Holdings, made: Chain, version: int) -> Chain:
    """Hold a version; the chain to it."""
    held = (made.anchor, *made.deltas)[version - FIRST]
    folder = holdings.incoming(held.manifest)
    for file in held.manifest.files:
        shutil.copy(held.folder / file.name, folder)
    holdings.add(held.manifest, held.manifest.files)
    found = holdings.chain(version)
    assert found is not None
    return found


def contents(paths: tuple[Path, ...] | None) -> list[bytes]:
    assert paths is not None
    return [path.read_bytes() for path in paths]


def bases(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "held" / "run" / ".rebuilt").glob("*"))


def test_versions_are_the_same_from_there_as_from_the_anchor(
    holdings: Holdings, made: Chain, tmp_path: Path
) -> None:
    lengths = []
    since = made.anchor.manifest.weights_digest
    for version in range(FIRST, FIRST + LENGTH + 1):
        short = take(holdings, made, version)
        long = Chain(anchor=made.anchor, deltas=made.deltas[: version - FIRST])
        lengths.append(len(short.deltas))
        assert short.manifest == long.manifest
        made_of = [tmp_path / f"{version}-short", tmp_path / f"{version}-long"]
        patches = [
            contents(write_patch(c, since, f)) for c, f in zip((short, long), made_of, strict=True)
        ]
        assert patches[0] == patches[1]
        full = [contents(write_full(c, f)) for c, f in zip((short, long), made_of, strict=True)]
        assert full[0] == full[1]
        since = short.manifest.weights_digest
        holdings.rebuild(version)
        holdings.prune(version)
        assert len(bases(tmp_path)) <= 1
    assert lengths == [0, 1, 2, 1, 2, 1, 2, 1, 2, 1]


def test_what_peers_get_and_what_is_fetched_is_as_without_it(
    holdings: Holdings, made: Chain, tmp_path: Path
) -> None:
    for version in range(FIRST, FIRST + 4):
        take(holdings, made, version)
    newest = made.deltas[2].manifest
    versions, folder = holdings.versions(), holdings.folder_of(newest.version)
    files = sorted(folder.iterdir())
    holdings.rebuild(newest.version)
    (base,) = bases(tmp_path)
    assert holdings.versions() == versions
    assert sorted(folder.iterdir()) == files
    for path in base.iterdir():
        for version in (*versions, 0):
            for name in (path.name, f"../.rebuilt/{base.name}/{path.name}", str(path)):
                assert holdings.file(version, name) is None
    assert holdings.makes(newest.version, newest.weights_digest)
    # Without the anchor there is no chain: it is fetched again, for the peers as well.
    holdings.forget(FIRST)
    assert holdings.chain(newest.version) is None
    assert not holdings.makes(newest.version, newest.weights_digest)
    assert take(holdings, made, FIRST).deltas == ()
    again = holdings.chain(newest.version)
    assert again is not None
    assert (again.anchor.manifest, again.deltas) == (newest, ())


def test_damage_is_found_and_the_anchor_is_still_there(
    holdings: Holdings, made: Chain, tmp_path: Path
) -> None:
    for version in range(FIRST, FIRST + 3):
        take(holdings, made, version)
    holdings.rebuild(FIRST + 2)
    (base,) = bases(tmp_path)
    (file,) = base.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    short = take(holdings, made, FIRST + 3)
    since = made.deltas[1].manifest.weights_digest
    with pytest.raises(WeightsError, match=r"version 5: tensor .* has other bytes"):
        write_patch(short, since, tmp_path / "wrong")
    holdings.forget_rebuilt()
    assert bases(tmp_path) == []
    whole = holdings.chain(FIRST + 3)
    assert whole is not None
    assert whole.anchor.manifest == made.anchor.manifest
    assert write_patch(whole, since, tmp_path / "right")


def test_a_new_process_starts_from_the_anchor(
    holdings: Holdings, made: Chain, tmp_path: Path
) -> None:
    for version in range(FIRST, FIRST + 3):
        take(holdings, made, version)
    holdings.rebuild(FIRST + 2)
    holdings.close()
    again = Holdings(tmp_path / "held", "run")
    found = again.chain(FIRST + 2)
    assert found is not None
    assert len(found.deltas) == 2
    assert bases(tmp_path) == []
    again.close()


def test_an_anchor_that_is_newer_ends_it(holdings: Holdings, tmp_path: Path) -> None:
    made, values = chain(tmp_path / "store", 2)
    for version in range(FIRST, FIRST + 3):
        take(holdings, made, version)
    holdings.rebuild(FIRST + 2)
    holdings.prune(FIRST + 2)
    assert holdings.versions() == (3, 4, 5)  # the anchor below it stays: it is what peers need
    assert len(bases(tmp_path)) == 1
    newer = anchor(FIRST + 3, moved(values[-1], 9), tmp_path / "store" / "v6")
    shutil.copytree(newer.folder, holdings.incoming(newer.manifest), dirs_exist_ok=True)
    holdings.add(newer.manifest, newer.manifest.files)
    holdings.prune(FIRST + 3)
    assert holdings.versions() == (6,)
    assert bases(tmp_path) == []


def test_a_short_chain_or_a_full_disk_has_none(
    holdings: Holdings, made: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in range(FIRST, FIRST + 3):
        take(holdings, made, version)
    holdings.rebuild(FIRST + 1)
    holdings.rebuild(FIRST + 7)  # not held
    monkeypatch.setattr(rebuilt, "ROOM", 1 << 60)
    holdings.rebuild(FIRST + 2)
    assert bases(tmp_path) == []
    monkeypatch.undo()
    (file,) = made.deltas[1].manifest.files
    (holdings.folder_of(FIRST + 2) / file.name).write_bytes(b"")
    with pytest.raises(WeightsError):
        holdings.rebuild(FIRST + 2)
    assert bases(tmp_path) == []
