"""Scratch folders: gone when they are closed, and swept by the next process where theirs was killed."""

import os
import subprocess
import sys
from pathlib import Path

from shared.scratch import Scratch

ROOT = Path(__file__).resolve().parents[2]
LEAVES = (
    "import sys\n"
    "from pathlib import Path\n"
    "from shared.scratch import Scratch\n"
    "made = Scratch(Path(sys.argv[1]), 'spoke-')\n"
    "(made.folder / 'deep').mkdir()\n"
    "(made.folder / 'deep' / 'weights').write_bytes(bytes(1000))\n"
    "print(made.folder, flush=True)\n"
    "sys.stdin.read()\n"
)


def test_a_killed_process_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        beside = Scratch(tmp_path, "spoke-")
        assert (left / "deep" / "weights").exists()
        process.kill()
    assert left.exists()
    after = Scratch(tmp_path, "spoke-")
    assert not left.exists()
    assert beside.folder.exists()
    beside.close()
    after.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_to_sweep_stays(tmp_path: Path) -> None:
    (tmp_path / "spoke-by-hand").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".lock").touch()
    (tmp_path / "other-killed").mkdir()
    (tmp_path / "other-killed" / ".lock").touch()
    (tmp_path / "spoke-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "spoke-trap").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "spoke-trap" / ".lock").symlink_to(tmp_path / "secret")
    before = sorted(tmp_path.rglob("*"))
    Scratch(tmp_path, "spoke-").close()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "secret").read_text() == "secret"


def test_it_is_of_its_user_alone(tmp_path: Path) -> None:
    made = Scratch(tmp_path / "made", "spoke-")
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "made") == [made.folder.name]
    made.close()
