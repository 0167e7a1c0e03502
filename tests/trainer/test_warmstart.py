"""The warm start: its tokenizer, its training, and the folder it leaves."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.problems import Split, Wording, rows
from trainer.warmstart import END, WarmstartSettings, final, run, settings_for

_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "SOURCE.md",
}


def settings(out: Path, **changes: Any) -> WarmstartSettings:
    small: dict[str, Any] = {"steps": 20, "problems": 400, "batch": 8, "heldout": 4, "longest": 16}
    return WarmstartSettings(out=out, **{**small, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("warmstart")
    return out, run(settings(out), lambda line: None)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_1_the_loss_falls_and_the_folder_is_complete(made: tuple[Path, Any]) -> None:
    out, result = made
    assert {p.name for p in out.iterdir()} == _FILES
    assert sum(result.losses[-3:]) / 3 < 0.8 * sum(result.losses[:3]) / 3
    assert 0.0 <= result.sampled <= 1.0


def test_2_transformers_loads_it(made: tuple[Path, Any]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(made[0])
    tokenizer: Any = AutoTokenizer.from_pretrained(made[0])
    assert model.dtype is torch.bfloat16
    assert 0.8e6 < model.num_parameters() < 0.9e6
    assert model.config.hidden_size == 32 * model.config.num_attention_heads
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == END
    ids = tokenizer("Mia has 5 coins.\n", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_3_the_tokenizer_round_trips_and_digits_stand_alone(made: tuple[Path, Any]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(made[0])
    assert len(tokenizer) == 352
    texts = [text for row in rows(Split.HELDOUT, 5, 50) for text in row.values()]
    for text in [*texts, "Zoë: 1,234.50 $ 漢字 \t  x\n\n"]:
        ids = tokenizer(str(text))["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([i]) for i in ids]
        assert all(len(p) == 1 for p in pieces if any(c.isascii() and c.isdigit() for c in p))


def test_4_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    made: tuple[Path, Any], tmp_path: Path
) -> None:
    # Only the first steps: what could differ between two runs differs there already.
    short = {"steps": 3, "heldout": 0}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(settings(tmp_path / name, seed=seed, **short), lambda line: None)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_5_the_final_number_is_what_follows_the_last_mark() -> None:
    assert final("a 1+1=2.\n#### 2") == "2"
    assert final("#### 1\n#### 7 ") == "7"
    assert final("no number") is None


def test_6_the_free_wording_has_settings_of_its_own_and_says_how_it_was_made(
    tmp_path: Path,
) -> None:
    usual = settings_for(Wording.FREE, tmp_path)
    assert (usual.wording, usual.vocabulary) == (Wording.FREE, 512)
    assert settings_for(Wording.FIXED, tmp_path) == WarmstartSettings(out=tmp_path)
    short = settings_for(Wording.FREE, tmp_path, steps=2, problems=400, batch=4, heldout=0)
    run(short, lambda line: None)
    source = (tmp_path / "SOURCE.md").read_text()
    command, *_ = [line for line in source.splitlines() if line.startswith("Made by")]
    assert command.endswith(" --wording free`.")
    assert "--steps 2" in command
    assert "`problems:train?seed=0&wording=free`" in source
    assert "`problems:heldout?wording=free`" in source
    assert {path.name for path in tmp_path.iterdir()} == _FILES
