"""From an anchor and deltas to the newest weights: whole and verified, or not at all.

1. Full shards of the newest version are byte for byte what a trainer writes of the same weights.
2. A patch from any version of the chain gives the newest weights, and names only what changed since.
3. Damage anywhere is found before anything is handed out, by version and tensor.
4. Versions that do not follow on one another are no chain.
"""

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from described import verify_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared import patch_file
from shared.chain import Chain, Held, write_full, write_patch, write_patch_and_shards
from shared.delta import decode, encode
from shared.delta_file import DeltaFiles, write_delta
from shared.errors import WeightsError
from shared.manifest import Manifest
from shared.shards import write_shards
from shared.tensor_files import TensorFiles, TensorInfo, sha256_of
from tests.shared.versions import INFOS, anchor, chain, delta, moved, step, weights


def patched(base, paths):
    """The naive reader of a patch."""
    result = {name: bits.copy() for name, bits in base.items()}
    with TensorFiles(paths) as files:
        names = {name.rpartition(".")[0] for name in files.tensors}
        assert files.tensors.keys() == {n + s for n in names for s in (".indices", ".values")}
        for name in names:
            indices = files.bits(name + ".indices").view(np.int32)
            assert (np.diff(indices) > 0).all()
            assert files.tensors[name + ".values"].dtype == INFOS[name].dtype
            result[name][indices] = files.bits(name + ".values")
    return result


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("deltas", [1, 2, 10])
def test_full_shards_are_what_a_trainer_writes(tmp_path: Path, deltas: int) -> None:
    links, values = chain(tmp_path, deltas)
    paths = write_full(links, tmp_path / "made")
    verify_tensors(paths, links.manifest)
    published = anchor(9, values[-1], tmp_path / "published")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in published.shards]


def test_an_anchor_alone_is_its_own_answer(tmp_path: Path) -> None:
    links, values = chain(tmp_path, 0)
    paths = write_full(links, tmp_path / "made")
    assert paths == tuple(tmp_path / "v3" / file.name for file in links.manifest.files)
    assert not (tmp_path / "made").exists()
    damage(paths[0], values[0]["model.embed.weight"].tobytes())
    with pytest.raises(WeightsError, match=r"version 3: tensor model\.embed\.weight has other"):
        write_full(links, tmp_path / "made")


@pytest.mark.parametrize("since", range(5))
def test_a_patch_from_any_version_gives_the_newest(tmp_path: Path, since: int) -> None:
    links, values = chain(tmp_path, 4)
    manifests = [links.anchor.manifest, *(held.manifest for held in links.deltas)]
    paths = write_patch(links, manifests[since].weights_digest, tmp_path / "patch")
    assert paths is not None
    assert bool(paths) == (since < 4)
    assert same(patched(values[since], paths), values[-1])
    load = [load_file(path) for path in paths]  # as torch would read it
    assert all(t.numel() for part in load for t in part.values())


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**32))
@settings(deadline=None, max_examples=25)
def test_a_patch_names_what_any_delta_named(
    tmp_path_factory: pytest.TempPathFactory, deltas: int, since: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    values = [weights(seed)]
    held = [anchor(0, values[0], folder / "v0")]
    for number in range(deltas):
        values.append(moved(values[-1], seed + number))
        held.append(delta(held[-1].manifest, *values[-2:], folder / f"v{number + 1}"))
    links = Chain(anchor=held[0], deltas=tuple(held[1:]))
    since = min(since, deltas)
    paths = write_patch(links, held[since].manifest.weights_digest, folder / "patch")
    with TensorFiles(paths or ()) as files:
        named = {
            name: set(files.bits(name).tolist()) for name in files.tensors if name.endswith("ces")
        }
    wanted: dict[str, set[int]] = {}
    for before, after in zip(values[since:-1], values[since + 1 :], strict=True):
        for name in before:
            if places := set(np.flatnonzero(before[name] != after[name]).tolist()):
                wanted.setdefault(name + ".indices", set()).update(places)
    assert named == wanted
    shutil.rmtree(folder)


def test_a_tensor_that_is_read_wrong_once_is_an_error_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, _ = chain(tmp_path, 2)
    wrong = ["0" * 64]
    monkeypatch.setattr(
        "shared.chain.sha256_of", lambda bits: wrong.pop() if wrong else sha256_of(bits)
    )
    with pytest.raises(WeightsError, match=r"version 5: tensor .* read wrong once and right now"):
        write_full(links, tmp_path / "made")


def test_weights_that_are_not_in_the_chain_have_no_patch(tmp_path: Path) -> None:
    links, _ = chain(tmp_path, 2)
    assert write_patch(links, "0" * 64, tmp_path / "patch") is None
    assert not (tmp_path / "patch").exists()


def test_equal_weights_of_two_versions_need_no_patch(tmp_path: Path) -> None:
    """A step that changed nothing: its holder is at the newest version already."""
    values = weights(0)
    first = anchor(0, values, tmp_path / "v0")
    second = delta(first.manifest, values, values, tmp_path / "v1")
    assert second.manifest.files == ()
    links = Chain(anchor=first, deltas=(second,))
    assert write_patch(links, first.manifest.weights_digest, tmp_path / "patch") == ()
    assert [path.read_bytes() for path in write_full(links, tmp_path / "full")] == [
        (tmp_path / "v0" / file.name).read_bytes() for file in first.manifest.files
    ]


def with_shortcut(folder: Path) -> tuple[Chain, list]:
    """Two deltas after an anchor, the second of which is an anchor itself."""
    links, values = chain(folder, 1)
    after = moved(values[-1], 7)
    before = links.manifest
    made = anchor(5, after, folder / "v5")
    shortcut = step(before, values[-1], after, folder / "v5")
    manifest = Manifest(**{**made.manifest.model_dump(), "shortcut": shortcut}).seal()
    newest = Held(manifest=manifest, folder=folder / "v5")
    return Chain(anchor=links.anchor, deltas=(*links.deltas, newest)), [*values, after]


def test_an_anchor_by_its_shortcut_is_rebuilt_in_the_same_pass(tmp_path: Path) -> None:
    links, values = with_shortcut(tmp_path)
    published = {f.name: (tmp_path / "v5" / f.name).read_bytes() for f in links.manifest.files}
    for name in published:
        (tmp_path / "v5" / name).unlink()  # the server never downloaded them
    since = links.deltas[0].manifest.weights_digest
    made = write_patch_and_shards(links, since, tmp_path / "patch", tmp_path / "v5")
    assert made.patch is not None
    assert same(patched(values[1], made.patch), values[-1])
    assert made.shards == links.manifest.files
    assert {name: (tmp_path / "v5" / name).read_bytes() for name in published} == published
    verify_tensors(write_full(Chain(anchor=links.deltas[-1]), tmp_path / "x"), links.manifest)


def test_an_anchor_that_somebody_else_wrote_is_not_rebuilt(tmp_path: Path) -> None:
    links, _ = with_shortcut(tmp_path)
    (file,) = links.manifest.files
    foreign = file.model_copy(update={"sha256": "0" * 64})
    manifest = links.manifest.model_copy(update={"files": (foreign,)})
    other = Chain(
        anchor=links.anchor, deltas=(links.deltas[0], replace(links.deltas[1], manifest=manifest))
    )
    with pytest.raises(WeightsError, match="version 5: the shards made here are not the published"):
        write_patch_and_shards(other, "0", tmp_path / "patch", tmp_path / "made")


def damage(path: Path, place: bytes) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(place)
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_damage_in_the_anchor_is_found_by_name(tmp_path: Path) -> None:
    links, values = chain(tmp_path, 3)
    damage(
        tmp_path / "v3" / links.anchor.manifest.files[0].name,
        values[0]["model.layer.weight"].tobytes(),
    )
    with pytest.raises(WeightsError, match=r"version 3: tensor model\.layer\.weight has other"):
        write_full(links, tmp_path / "made")


def test_a_wrong_delta_is_found_by_name(tmp_path: Path) -> None:
    """Well-formed, but of another step: only the hash can tell."""
    links, values = chain(tmp_path, 3)
    held = links.deltas[1]
    (file,) = held.manifest.files
    with DeltaFiles([held.folder / file.name]) as files:
        blobs = {name: files.blob(name) or b"" for name in files.names}
    before = values[1]["model.layer.weight"]
    blobs["model.layer.weight"] = encode(before, before + np.uint16(3)) or b""
    (wrong,) = write_delta(blobs.items(), held.folder)
    (held.folder / wrong.name).rename(held.folder / file.name)
    for write in (
        lambda: write_full(links, tmp_path / "made"),
        lambda: write_patch(links, links.anchor.manifest.weights_digest, tmp_path / "patch"),
    ):
        with pytest.raises(WeightsError, match=r"version 5: tensor model\.layer\.weight has other"):
            write()
    # Version 4 is whole all the same.
    write_full(replace(links, deltas=links.deltas[:1]), tmp_path / "earlier")


def test_a_damaged_delta_is_found_by_name(tmp_path: Path) -> None:
    links, _ = chain(tmp_path, 2)
    held = links.deltas[1]
    (file,) = held.manifest.files
    with DeltaFiles([held.folder / file.name]) as files:
        blob = files.blob("model.embed.weight")
    assert blob is not None
    damage(held.folder / file.name, blob)
    with pytest.raises(WeightsError, match=r"version 5: tensor model\.embed\.weight: not a delta"):
        write_full(links, tmp_path / "made")


def test_a_missing_file_is_found_by_name(tmp_path: Path) -> None:
    links, _ = chain(tmp_path, 2)
    (file,) = links.deltas[0].manifest.files
    (links.deltas[0].folder / file.name).unlink()
    with pytest.raises(WeightsError, match=rf"version 4: {file.name}"):
        write_full(links, tmp_path / "made")
    (file,) = links.anchor.manifest.files
    (links.anchor.folder / file.name).unlink()
    with pytest.raises(WeightsError, match=rf"version 3: {file.name}"):
        write_full(links, tmp_path / "made")


def test_a_delta_of_a_tensor_that_is_not_there_is_refused(tmp_path: Path) -> None:
    links, values = chain(tmp_path, 1)
    blob = encode(values[0]["model.scale"], values[0]["model.scale"] + np.uint32(1)) or b""
    (entry,) = write_delta([("stranger", blob)], links.deltas[0].folder)
    manifest = links.manifest.model_copy(update={"files": (entry,)})
    with pytest.raises(WeightsError, match="version 4: it changes stranger"):
        write_full(replace(links, deltas=(replace(links.deltas[0], manifest=manifest),)), tmp_path)


def test_shards_of_other_tensors_than_the_manifest_names_are_refused(tmp_path: Path) -> None:
    links, values = chain(tmp_path, 0)
    few = [info for info in INFOS.values() if info.name != "model.scale"]
    files = write_shards(few, values[0].__getitem__, tmp_path / "few")
    manifest = links.manifest.model_copy(update={"files": files})
    with pytest.raises(WeightsError, match="version 3: its shards hold other tensors"):
        write_full(Chain(anchor=Held(manifest=manifest, folder=tmp_path / "few")), tmp_path)


def test_versions_that_do_not_follow_on_one_another_are_no_chain(tmp_path: Path) -> None:
    links, _ = chain(tmp_path, 3)
    first, second, third = links.deltas
    with pytest.raises(WeightsError, match="version 5 starts from version 4"):
        Chain(anchor=links.anchor, deltas=(second, third))
    with pytest.raises(WeightsError, match="version 6 starts from version 5"):
        Chain(anchor=links.anchor, deltas=(first, third))
    with pytest.raises(WeightsError, match="version 4 is no anchor"):
        Chain(anchor=first)
    with pytest.raises(WeightsError, match="version 3 has no delta"):
        Chain(anchor=links.anchor, deltas=(links.anchor,))
    other = anchor(3, weights(99), tmp_path / "other")
    with pytest.raises(WeightsError, match=r"version 4 starts from version 3 \(.*not from"):
        Chain(anchor=other, deltas=(first,))
    fewer = first.manifest.model_copy(update={"tensors": first.manifest.tensors[1:]})
    with pytest.raises(WeightsError, match="version 4 has other tensors"):
        Chain(anchor=links.anchor, deltas=(replace(first, manifest=fewer),))


def test_a_patch_is_split_like_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links, values = chain(tmp_path, 2)
    monkeypatch.setattr(patch_file, "SHARD_BYTES", 40)
    monkeypatch.setattr(patch_file, "_IN_MEMORY", 8)  # the spools become files
    paths = write_patch(links, links.anchor.manifest.weights_digest, tmp_path / "patch")
    assert paths is not None
    assert len(paths) == 2
    assert sorted(tmp_path.joinpath("patch").iterdir()) == sorted(paths)
    assert same(patched(values[0], paths), values[-1])


def test_a_patch_that_failed_leaves_no_spools(tmp_path: Path) -> None:
    def stopped() -> None:
        with patch_file.PatchWriter(tmp_path) as writer:
            writer.write(INFOS["model.scale"], np.zeros(1, np.int32), np.ones(1, np.uint32))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, monkeypatch) -> None:
    size, count = 1 << 20, 8
    infos = {f"t{n}": TensorInfo(name=f"t{n}", dtype="BF16", shape=(size,)) for n in range(count)}
    monkeypatch.setattr("tests.shared.versions.INFOS", infos)
    rng = np.random.default_rng(0)
    before = {name: rng.integers(0, 1 << 16, size, np.uint16) for name in infos}
    after = {
        name: bits + (rng.random(size) < 0.01).astype(np.uint16) for name, bits in before.items()
    }
    first = anchor(0, before, tmp_path / "v0")
    links = Chain(anchor=first, deltas=(delta(first.manifest, before, after, tmp_path / "v1"),))
    tracemalloc.start()
    write_patch_and_shards(links, first.manifest.weights_digest, tmp_path / "p", tmp_path / "s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = size * 2
    assert peak < 4 * largest < count * largest, f"{peak / largest:.1f} times the largest tensor"


def test_a_delta_file_is_read_as_it_was_encoded(tmp_path: Path) -> None:
    links, values = chain(tmp_path, 1)
    (file,) = links.manifest.files
    with DeltaFiles([links.deltas[0].folder / file.name]) as files:
        for name in files.names:
            target = values[0][name].copy()
            decode(files.blob(name) or b"", target).write_into(target)
            assert np.array_equal(target, values[1][name])
