"""Folders that a run is given: what cannot be used is refused in one line, and nothing in it is touched."""

from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.fsspec_store import FsspecStore
from trainer.prepare import open_folder
from trainer.storing import check_folder


def test_a_store_that_cannot_be_written_to_is_refused_by_its_settings_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"fleet\.store .*file/w: Not a directory; give a folder"):
        check_folder(FsspecStore(f"file://{tmp_path / 'file' / 'w'}", "run"), "fleet.store")
    check_folder(FsspecStore(f"file://{tmp_path / 'new'}", "run"), "fleet.store")
    assert list((tmp_path / "new").iterdir()) == []
    check_folder(FsspecStore("memory://w", "run"), "fleet.store")


def test_a_run_folder_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run-dir .*: Not a directory; give another"):
        open_folder(tmp_path / "file" / "run", resume=False)


def test_a_run_without_a_checkpoint_says_how_to_start_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start anew without --resume"):
        open_folder(tmp_path / "none", resume=True)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="start anew with another --run-dir"):
        open_folder(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="a run is in it already"):
        open_folder(tmp_path, resume=False)
