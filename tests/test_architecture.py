"""The layers, from the syntax tree: no install and no heavy import needed."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "shared": {"shared"},
    "server": {"server", "shared"},
    "trainer": {"trainer", "shared"},
}
ONLY_IN = {
    "vllm": {
        "server/engines/vllm.py",
        "server/engines/vllm_openai.py",
        "server/engines/vllm_start.py",
        "server/engines/vllm_transfer_worker.py",
        "server/engines/vllm_worker.py",
    },
    "redis": {"shared/coordination.py"},
    "fsspec": {"shared/file_system.py", "shared/new_files.py"},
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards_and_seams_hold(path: Path) -> None:
    name = path.relative_to(ROOT)
    found = imported(path)
    assert not (found & set(MAY_IMPORT)) - MAY_IMPORT[name.parts[0]]
    for module, files in ONLY_IN.items():
        assert module not in found or str(name) in files, f"{name} imports {module}"
    assert name.parts[0] == "server" or "fastapi" not in found


def test_the_readme_has_a_line_for_every_file() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The parts")[2]
    listed = Counter(
        line.split()[0].rpartition("/")[2] for line in tree.splitlines() if line.strip()
    )
    there = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert {name for name, count in there.items() if listed[name] != count} == set()


def test_shared_imports_without_the_heavy_stack() -> None:
    code = (
        "import sys, pkgutil, importlib, shared\n"
        "for m in pkgutil.walk_packages(shared.__path__, 'shared.'): importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'vllm', 'fastapi', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["-m", "server"], ["-m", "trainer.cli"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("usage:")
    assert not [
        heavy
        for heavy in ("torch", "vllm", "transformers", "pydantic")
        if f" {heavy}\n" in run.stderr
    ]
