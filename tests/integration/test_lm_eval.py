"""lm-eval's `local-completions` against a real server, as docs/openai.md says: sampled and scored.

Runs where an `lm_eval` is on the PATH or named by `SPOKE_LM_EVAL`; it lives in an environment of its own.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
LM_EVAL = os.environ.get("SPOKE_LM_EVAL") or shutil.which("lm_eval")
LIMIT = 20

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed: docs/openai.md says how"),
]


def command(url: str, tokenizer: Path, out: Path) -> list[str]:
    """The command of docs/openai.md for this server."""
    text = (ROOT / "docs/openai.md").read_text()
    found = re.search(r"^    lm_eval run(?:.*\\\n)*.*", text, re.MULTILINE)
    assert found is not None
    line = found.group().replace("\\\n", " ")
    line = line.replace("http://127.0.0.1:8000", url).replace("CHECKPOINT", str(tokenizer))
    return [str(LM_EVAL), *line.split()[1:], "--output_path", str(out), "--log_samples"]


@pytest.fixture(scope="module")
def samples(
    openai_server: Any, chat_model: Path, gsm8k: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("lm_eval")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(out / "cache"),
        "OPENAI_API_KEY": "unused",
    }
    done = subprocess.run(
        command(openai_server.url, chat_model, out),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for file in out.rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[re.sub(r"samples_(.*)_\d{4}-.*", r"\1", file.name)] = lines
    return found


@torch.no_grad()
def test_likelihoods_are_those_of_transformers(
    samples: dict[str, list[dict[str, Any]]], chat_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()
    assert len(samples["gsm8k_choice"]) == LIMIT
    for sample in samples["gsm8k_choice"]:
        for asked, ((value, _),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            prompt = tokenizer(asked["arg_0"])["input_ids"]
            ids = tokenizer(asked["arg_0"] + asked["arg_1"])["input_ids"]
            rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            each = rows[range(len(ids) - 1), ids[1:]]
            assert float(value) == pytest.approx(each[len(prompt) - 1 :].sum().item(), abs=1e-3)


@torch.no_grad()
def test_responses_are_greedy(samples: dict[str, list[dict[str, Any]]], chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()
    assert len(samples["gsm8k_generate"]) == LIMIT
    for sample in samples["gsm8k_generate"]:
        ((text,),) = sample["resps"]
        prompt = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt")
        own = model.generate(**prompt, max_new_tokens=120, do_sample=False, pad_token_id=0)
        response = own[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(response, skip_special_tokens=True) == text
