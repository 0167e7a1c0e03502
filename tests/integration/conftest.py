"""Real servers that follow a run in a real Redis, one of each engine, started when first needed."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import running_server


@dataclass(frozen=True)
class Following:
    """A server that follows a run."""

    url: str
    run: str
    redis_url: str
    store: str


def _following(
    engine: str, model: Path, redis_url: str, folder: Path, *arguments: str
) -> Iterator[Following]:
    store = f"file://{folder / 'store'}"
    run = f"run-{folder.name}"
    follow = ["--redis-url", redis_url, "--run", run, "--store", store]
    chosen = ["--engine", engine, "--dtype", "float32", *arguments]
    with running_server(model, folder / "server.log", *chosen, *follow) as server:
        yield Following(url=server.url, run=run, redis_url=redis_url, store=store)


@pytest.fixture(scope="session")
def transformers_server(
    tiny_math: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Following]:
    """A server on the transformers engine that follows a run of its own."""
    yield from _following(
        "transformers", tiny_math, redis_url, tmp_path_factory.mktemp("transformers")
    )


@pytest.fixture(scope="session")
def vllm_server(
    tiny_math: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Following]:
    """A server on a real vLLM CPU engine that follows a run of its own."""
    yield from _following(
        "vllm", tiny_math, redis_url, tmp_path_factory.mktemp("vllm"), "--max-model-len", "512"
    )


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def following(request: pytest.FixtureRequest) -> Following:
    """Each engine's server in turn."""
    found: Following = request.getfixturevalue(f"{request.param}_server")
    return found


CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
"""Questions as the tiny model was trained on them."""


@pytest.fixture(scope="session")
def chat_model(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny maths model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(tiny_math, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template": CHAT_TEMPLATE}
    file.unlink()  # the copy is as read-only as the original
    file.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def openai_server(
    chat_model: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Following]:
    """A vLLM server that calls its model `tiny`, with memory for 4,000 tokens: requests push each other out."""
    small = ["--max-model-len", "512", "--kv-cache-gib", "0.0082", "--served-model-name", "tiny"]
    # The engine itself is to be full, not the server's gate in front of it.
    small += ["--max-tokens-in-flight", "1000000", "--max-tree-tokens", "20000"]
    yield from _following("vllm", chat_model, redis_url, tmp_path_factory.mktemp("openai"), *small)
