"""A snapshot becomes a version: a delta where it is worth it, an anchor where not, and both when an anchor is due.

Every version is read back by the servers' own code (`shared.chain`) and compared to the bit.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.chain import Chain, Held, write_full, write_patch_and_shards
from shared.errors import WeightsError
from shared.manifest import Encoding, Manifest
from trainer import encoding
from trainer.encoding import EncodedVersion, encode_version


def snapshot(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(400, 64, generator=generator).bfloat16(),
        "norm": torch.ones(64),
        "layer": torch.randn(64, 96, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "counter": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4, dtype=torch.float16),
    }


def stepped(tensors: Mapping[str, Tensor], share: float = 0.01, seed: int = 1) -> dict[str, Tensor]:
    """About this share of the two matrices moved to the next float."""
    generator = torch.Generator().manual_seed(seed)
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("embed", "layer"):
        moved = torch.rand(new[name].shape, generator=generator) < share
        new[name].view(torch.int16)[moved] += 1
    return new


def version(
    number: int,
    tensors: Mapping[str, Tensor],
    root: Path,
    previous: EncodedVersion | None = None,
    anchor_due: bool = False,
    most_changed: float = encoding.MOST_CHANGED,
) -> EncodedVersion:
    return encode_version(
        tensors,
        run="run",
        version=number,
        dtype="bfloat16",
        folder=root / f"v{number}",
        previous=previous,
        anchor_due=anchor_due,
        most_changed=most_changed,
    )


def held(made: EncodedVersion, root: Path) -> Held:
    """As a server has it: the manifest went through its stored form, and the files are checked."""
    number = made.manifest.version
    manifest = Manifest.decode(made.manifest.encode(), run="run", version=number)
    folder = root / f"v{number}"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()} if made.files else {}
    assert sizes == {file.name: file.size for file in made.files}
    return Held(manifest=manifest, folder=folder)


def equal(paths: tuple[Path, ...], tensors: Mapping[str, Tensor]) -> bool:
    loaded = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    return loaded.keys() == tensors.keys() and all(
        loaded[name].dtype == tensor.dtype
        and loaded[name].shape == tensor.shape
        and torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        for name, tensor in tensors.items()
    )


def test_the_first_version_is_an_anchor(tmp_path: Path) -> None:
    made = version(0, snapshot(), tmp_path)
    assert made.manifest.is_anchor
    assert made.manifest.shortcut is None
    assert (made.deltas, made.delta_bytes) == (0, 0)
    assert equal(write_full(Chain(anchor=held(made, tmp_path)), tmp_path / "x"), snapshot())


def test_a_step_is_a_delta_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    first = version(0, snapshot(), tmp_path)
    after = stepped(snapshot())
    second = version(5, after, tmp_path, first)
    assert second.manifest.encoding is Encoding.DELTA
    assert second.manifest.base_version == 0
    assert second.manifest.base_digest == first.manifest.weights_digest
    assert second.deltas == 1
    assert second.delta_bytes == sum(file.size for file in second.files)
    full = sum(tensor.nbytes for tensor in after.values())
    assert second.delta_bytes < full / 20
    links = Chain(anchor=held(first, tmp_path), deltas=(held(second, tmp_path),))
    assert equal(write_full(links, tmp_path / "x"), after)


def test_the_manifest_is_the_same_whichever_way_it_went(tmp_path: Path) -> None:
    """Hashes that were carried over are those of the tensors."""
    first = version(0, snapshot(), tmp_path)
    after = stepped(snapshot())
    second = version(1, after, tmp_path / "a", first)
    alone = version(1, after, tmp_path / "b")
    assert second.manifest.tensors == alone.manifest.tensors
    assert second.manifest.weights_digest == alone.manifest.weights_digest


def test_an_anchor_that_is_due_has_its_delta_beside_it(tmp_path: Path) -> None:
    first = version(0, snapshot(), tmp_path)
    one, two = stepped(snapshot(), seed=1), stepped(stepped(snapshot(), seed=1), seed=2)
    second = version(1, one, tmp_path, first)
    third = version(2, two, tmp_path, second, anchor_due=True)
    assert third.manifest.is_anchor
    assert third.manifest.shortcut is not None
    assert third.manifest.shortcut.base_version == 1
    assert (third.deltas, third.delta_bytes) == (0, 0)
    anchor = held(third, tmp_path)
    assert equal(write_full(Chain(anchor=anchor), tmp_path / "x"), two)
    links = Chain(anchor=held(first, tmp_path), deltas=(held(second, tmp_path), anchor))
    since = second.manifest.weights_digest
    made = write_patch_and_shards(links, since, tmp_path / "patch", tmp_path / "rebuilt")
    assert made.shards == third.manifest.files
    assert made.patch


def test_nothing_changed_is_a_delta_without_files(tmp_path: Path) -> None:
    first = version(0, snapshot(), tmp_path)
    second = version(1, snapshot(), tmp_path, first)
    assert second.manifest.encoding is Encoding.DELTA
    assert second.files == ()
    assert second.manifest.weights_digest == first.manifest.weights_digest


def test_nan_and_signed_zero_are_bits_like_any(tmp_path: Path) -> None:
    before, after = snapshot(), snapshot()
    before["norm"][:3] = torch.tensor([float("nan"), 0.0, float("inf")])
    after["norm"][:3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    first = version(0, before, tmp_path)
    second = version(1, after, tmp_path, first)
    assert second.manifest.encoding is Encoding.DELTA
    links = Chain(anchor=held(first, tmp_path), deltas=(held(second, tmp_path),))
    assert equal(write_full(links, tmp_path / "x"), after)


def test_much_that_changed_is_noticed_before_it_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> bytes:
        raise AssertionError("a delta was encoded")

    first = version(0, snapshot(), tmp_path)
    monkeypatch.setattr(encoding, "encode", never)
    second = version(1, stepped(snapshot(), share=0.5), tmp_path, first)
    assert second.manifest.is_anchor
    assert second.manifest.shortcut is None


def test_for_slow_lines_much_that_changed_is_a_delta_all_the_same(tmp_path: Path) -> None:
    after = stepped(snapshot(), share=0.5)
    first = version(0, snapshot(), tmp_path)
    second = version(1, after, tmp_path, first, most_changed=1.0)
    assert second.manifest.encoding is Encoding.DELTA
    assert second.delta_bytes < 0.25 * sum(tensor.nbytes for tensor in after.values())
    links = Chain(anchor=held(first, tmp_path), deltas=(held(second, tmp_path),))
    assert equal(write_full(links, tmp_path / "x"), after)
    assert (
        version(2, after, tmp_path, second, most_changed=0.0).manifest.encoding is Encoding.DELTA
    ), "nothing changed"
    assert version(3, snapshot(), tmp_path, second, most_changed=0.0).manifest.is_anchor


def test_a_delta_that_grows_too_large_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "MOST_DELTA", 0.001)
    first = version(0, snapshot(), tmp_path)
    after = stepped(snapshot(), share=0.1)
    second = version(1, after, tmp_path, first)
    assert second.manifest.is_anchor
    assert second.manifest.shortcut is None
    assert equal(write_full(Chain(anchor=held(second, tmp_path)), tmp_path / "x"), after)


def test_deltas_that_add_up_bring_an_anchor(tmp_path: Path) -> None:
    made, tensors, kinds = None, snapshot(), []
    full = sum(tensor.nbytes for tensor in tensors.values())
    for number in range(12):
        before, made = made, version(number, tensors, tmp_path, made)
        kinds.append(made.manifest.is_anchor)
        tensors = stepped(tensors, share=0.2, seed=number)
        if before is not None and made.manifest.is_anchor:
            assert made.manifest.shortcut is not None
            sizes = [file.size for file in made.manifest.shortcut.files]
            assert before.delta_bytes <= full / 2 < before.delta_bytes + sum(sizes)
    assert kinds == [True, *[False] * 6, True, *[False] * 4]


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "fewer"])
def test_other_tensors_are_an_anchor(tmp_path: Path, change: str) -> None:
    first = version(0, snapshot(), tmp_path)
    after = snapshot()
    layer = after.pop("layer")
    match change:
        case "name":
            after["layers"] = layer
        case "shape":
            after["layer"] = layer.reshape(96, 64)
        case "dtype":
            after["layer"] = layer.half()
    second = version(1, after, tmp_path, first)
    assert second.manifest.is_anchor
    assert second.manifest.shortcut is None
    assert equal(write_full(Chain(anchor=held(second, tmp_path)), tmp_path / "x"), after)


def test_a_folder_that_cannot_be_written_is_a_weights_error(tmp_path: Path) -> None:
    (tmp_path / "v0").write_text("no folder")
    with pytest.raises(WeightsError, match="v0"):
        version(0, snapshot(), tmp_path)
