"""Real servers that follow a run in a real Redis, one of each engine, started when first needed."""

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
    follow = ["--redis-url", redis_url, "--run", f"run-{engine}", "--store", store]
    chosen = ["--engine", engine, "--dtype", "float32", *arguments]
    with running_server(model, folder / "server.log", *chosen, *follow) as server:
        yield Following(url=server.url, run=f"run-{engine}", redis_url=redis_url, store=store)


@pytest.fixture(scope="session")
def transformers_server(
    tiny_math: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Following]:
    """A server on the transformers engine that follows `run-transformers`."""
    yield from _following(
        "transformers", tiny_math, redis_url, tmp_path_factory.mktemp("transformers")
    )


@pytest.fixture(scope="session")
def vllm_server(
    tiny_math: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Following]:
    """A server on a real vLLM CPU engine that follows `run-vllm`."""
    yield from _following(
        "vllm", tiny_math, redis_url, tmp_path_factory.mktemp("vllm"), "--max-model-len", "512"
    )


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def following(request: pytest.FixtureRequest) -> Following:
    """Each engine's server in turn."""
    found: Following = request.getfixturevalue(f"{request.param}_server")
    return found
