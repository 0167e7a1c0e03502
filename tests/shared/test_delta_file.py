"""The files of a delta version: blobs by tensor name, and nothing that is damaged is read."""

from pathlib import Path

import pytest
import zstandard

from shared import delta_file
from shared.delta_file import DeltaFiles, write_delta
from shared.errors import WeightsError

BLOBS = {"a.weight": b"12345", "b.weight": b"", "ç": bytes(1000)}


def test_blobs_come_back_by_name(tmp_path: Path) -> None:
    (entry,) = write_delta(BLOBS.items(), tmp_path)
    assert entry.name == f"delta-00000-{entry.sha256[:8]}.spd"
    with DeltaFiles([tmp_path / entry.name]) as files:
        assert files.names == BLOBS.keys()
        assert {name: files.blob(name) for name in BLOBS} == BLOBS
        assert files.blob("another") is None


def test_nothing_changed_gives_no_file(tmp_path: Path) -> None:
    assert write_delta([], tmp_path) == ()
    with DeltaFiles([]) as files:
        assert files.names == frozenset()


def test_files_are_bounded(tmp_path: Path) -> None:
    blobs = {f"t{number}": bytes([number]) * 40 for number in range(7)} | {"large": bytes(500)}
    entries = write_delta(blobs.items(), tmp_path, file_bytes=100)
    assert [entry.name[:11] for entry in entries] == [f"delta-{n:05d}" for n in range(5)]
    with DeltaFiles(tmp_path / entry.name for entry in entries) as files:
        assert {name: files.blob(name) for name in blobs} == blobs


def test_one_blob_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The next blob is asked for once the one before is written."""
    written = []

    def blobs():
        for number in range(3):
            written.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
            yield f"t{number}", bytes(1 << 16)

    write_delta(blobs(), tmp_path)
    assert written == [0, 1 << 16, 2 << 16]


def test_every_cut_and_every_changed_byte_of_the_table_is_refused(tmp_path: Path) -> None:
    (entry,) = write_delta(BLOBS.items(), tmp_path)
    path, content = tmp_path / "damaged.spd", (tmp_path / entry.name).read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=r"damaged\.spd is not a whole delta file"):
            DeltaFiles([path])
    table = sum(map(len, BLOBS.values()))
    for place in range(table, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            with DeltaFiles([path]) as files:
                read = [files.blob(name) for name in files.names]
        except WeightsError:
            continue
        assert sum(map(len, (blob for blob in read if blob is not None))) == table


def test_a_table_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lie.spd"
    for table in (
        b'[["a",11]]',
        b'[["a",-1],["b",11]]',
        b'[["a",5],["a",5]]',
        b'[["a",5]]',
        b'[["a",5.0],["b",5]]',
        b'[[["a"],10]]',
        b'{"a":10}',
        b"nothing",
        b"[5]",
    ):
        frame = zstandard.ZstdCompressor().compress(table)
        path.write_bytes(bytes(10) + frame + delta_file._TAIL.pack(len(frame), b"SpDF"))
        with pytest.raises(WeightsError, match="not a whole delta file"):
            DeltaFiles([path])


def test_a_table_bomb_is_refused(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor().compress(bytes((1 << 26) + 1))
    (tmp_path / "bomb.spd").write_bytes(frame + delta_file._TAIL.pack(len(frame), b"SpDF"))
    with pytest.raises(WeightsError, match="claims 67108865 bytes"):
        DeltaFiles([tmp_path / "bomb.spd"])


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    (entry,) = write_delta(BLOBS.items(), tmp_path)
    with pytest.raises(WeightsError, match=r"a\.weight"):
        DeltaFiles([tmp_path / entry.name] * 2)


def test_a_missing_file_is_a_weights_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.spd"):
        DeltaFiles([tmp_path / "none.spd"])
