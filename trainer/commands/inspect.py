"""`spoke inspect TREE.json`: what the trainer would do with a saved tree, as text, as JSON, or as a page."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from shared.errors import ConfigError
from shared.pieces import Decode
from shared.tree import Role
from trainer.algorithms import AlgorithmName, AlgorithmSettings
from trainer.config import apply_override, explain, load
from trainer.inspect_html import page
from trainer.inspect_text import render
from trainer.inspection import inspect
from trainer.token_text import load_decoder, token_texts
from trainer.tree_file import SavedTree, parse


class _Sections(BaseModel):
    """What `--set` may name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: AlgorithmSettings


def run(args: argparse.Namespace) -> int:
    """Inspect one tree and show it."""
    saved = _read(args.tree)
    settings, max_tokens = _settings(args, saved)
    try:
        inspection = inspect(saved, settings, max_tokens=max_tokens)
    except ConfigError as error:
        raise ConfigError(f"{args.tree}: {error}") from None
    if args.json:
        objects = inspection.as_json()
        print("[" + ",".join(f"\n {json.dumps(one)}" for one in objects) + "\n]")
    if args.html is not None:
        _write(args.html, page(inspection, _texts(args, saved), title=Path(args.tree).name))
        print(f"wrote {args.html}", file=sys.stderr)
    if not args.json and args.html is None:
        Console().print(render(inspection, _texts(args, saved)), highlight=False)
    return 0


def _read(path: str) -> SavedTree:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
        return parse(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give a saved answer of /rollout_tree"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not JSON: it is not UTF-8 text") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _settings(args: argparse.Namespace, saved: SavedTree) -> tuple[AlgorithmSettings, int | None]:
    """(settings of the algorithm, the responses' limit where a configuration says one)."""
    raw: dict[str, Any] = {"algorithm": {}}
    max_tokens = None
    if args.config is not None:
        config = load(args.config)
        raw["algorithm"] = config.algorithm.model_dump()
        max_tokens = config.rollout.max_tokens
    elif saved.is_chain:
        raw["algorithm"]["name"] = AlgorithmName.SPO_CHAIN
    for override in args.overrides:
        apply_override(raw, override)
    try:
        return _Sections.model_validate(raw).algorithm, max_tokens
    except ValidationError as error:
        raise ConfigError(f"--set: {explain(error, _Sections)}") from None


def _texts(args: argparse.Namespace, saved: SavedTree) -> dict[int, list[str]]:
    texts = token_texts(saved, _decoder(args, saved))
    segments = (node for node in saved.tree.nodes if node.role is Role.SEGMENT)
    missing = sum(node.id not in texts for node in segments if node.text)
    if args.tokenizer is not None and missing:
        print(
            f"spoke inspect: {missing} texts are not those of --tokenizer {args.tokenizer}; shown whole",
            file=sys.stderr,
        )
    return texts


def _decoder(args: argparse.Namespace, saved: SavedTree) -> Decode | None:
    if args.tokenizer is not None:
        return load_decoder(args.tokenizer)
    if saved.model is None or not Path(saved.model).is_dir():
        return None
    try:
        return load_decoder(saved.model)
    except ConfigError as error:  # nobody asked for it: do without
        print(f"spoke inspect: tokens are not told apart: {error}", file=sys.stderr)
        return None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"--html {path}: {error.strerror}; give a file in a folder that is there"
        ) from None
