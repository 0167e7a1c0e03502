"""Canonical shards: the same tensors give the same files, whoever writes them.

1. The safetensors library reads them; the files are named after their content.
2. Two writers of the same tensors write the same bytes, in whatever order they name them.
3. A file ends before it would be larger than `SHARD_BYTES`.
4. What goes wrong leaves no file of that name, and says so.
"""

import errno
import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from described import tensor_entries
from safetensors import safe_open
from safetensors.torch import load_file

from shared import shards
from shared.errors import WeightsError
from shared.shards import ShardWriter, canonical_order, write_shards
from shared.tensor_files import TensorFiles, TensorInfo, bits_type
from tests.shared.versions import INFOS, entries, weights

ALL = list(INFOS.values())


def write(folder: Path, infos: Sequence[TensorInfo] = ALL, seed: int = 0) -> list[Path]:
    values = weights(seed)
    return [folder / file.name for file in write_shards(infos, values.__getitem__, folder)]


def test_the_safetensors_library_reads_them(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    values, loaded = weights(0), load_file(path)
    assert loaded.keys() == INFOS.keys()
    assert loaded["model.embed.weight"].dtype == torch.bfloat16
    for name, tensor in loaded.items():
        assert tuple(tensor.shape) == INFOS[name].shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == values[name].tobytes()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
    assert sorted(tensor_entries(path), key=lambda e: e.name) == sorted(
        entries(values), key=lambda e: e.name
    )


def test_files_are_named_after_their_content(tmp_path: Path) -> None:
    values = weights(0)
    (entry,) = write_shards(INFOS.values(), values.__getitem__, tmp_path)
    content = (tmp_path / entry.name).read_bytes()
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert entry.name == f"weights-00000-{entry.sha256[:8]}.safetensors"
    assert entry.size == len(content)
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]
    assert write(tmp_path, seed=1) != write(tmp_path, seed=0)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_writers_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", ALL[::-1])
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_every_tensor_lies_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    with TensorFiles(write(tmp_path)) as files:
        for name, info in files.tensors.items():
            assert files._places[name][2] % bits_type(info.dtype).itemsize == 0


@pytest.mark.parametrize(("limit", "files"), [(1, 6), (100, 3), (2 << 30, 1)])
def test_shards_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, files: int
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    paths = write(tmp_path)
    sizes = []
    for path in paths:
        with TensorFiles([path]) as one:
            sizes.append([info.nbytes for info in one.tensors.values()])
    assert len(paths) == files
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
    with TensorFiles(paths) as all_files:
        for name, bits in weights(0).items():
            assert np.array_equal(all_files.bits(name), bits)


def test_no_tensors_no_files(tmp_path: Path) -> None:
    assert write(tmp_path, []) == []


def test_an_exception_leaves_no_file_behind(tmp_path: Path) -> None:
    values = weights(0)

    def stopped() -> None:
        with ShardWriter(ALL, tmp_path) as writer:
            writer.write(values[writer.order[0].name])
            assert len(list(tmp_path.iterdir())) == 1
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_weights_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(WeightsError, match="No space left"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_weights_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(WeightsError, match="file"):
        write(tmp_path / "file" / "below")


def file_of(dtype: str, shape: list[int], begin: int, end: int) -> bytes:
    """A safetensors file of one tensor, with four bytes of content whatever its header says."""
    fields = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"\xff" * 20, "cut short"),
        (struct.pack("<Q", 2) + b"[]", "not a whole"),
        (struct.pack("<Q", 2) + b"{]", "not a whole"),
        (file_of("F32", [2], 0, 4), "other bytes"),
        (file_of("F32", [-1, -1], 0, 4), "other bytes"),
        (file_of("F32", [2], 0, 8), "outside"),
        (file_of("F32", [1], -4, 0), "outside"),
        (file_of("F4", [8], 0, 4), "F4"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=match):
        TensorFiles([path])


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    with pytest.raises(WeightsError, match="twice"):
        TensorFiles([path, path])


def test_the_order_is_by_width_then_name() -> None:
    assert [info.name for info in canonical_order(INFOS.values())] == [
        "model.steps",
        "model.norm.weight",
        "model.scale",
        "model.embed.weight",
        "model.empty",
        "model.layer.weight",
    ]


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    odd = TensorInfo(name="a", dtype="F4", shape=(2,))
    with pytest.raises(WeightsError, match="F4"):
        write(tmp_path, [odd])
