"""Both engines, started once per session, for tests that must hold on either.

Tests that use them run on the session's event loop (`pytest.mark.asyncio(loop_scope="session")`): an engine
belongs to the loop that it was opened on.
"""

import importlib
import multiprocessing
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.engines.base import Engine, Weights
from server.engines.settings import EngineSettings


async def open_vllm(model: Path, dtype: str = "float32") -> Engine:
    """vLLM with a worker whose writes of weights can be made to fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _module("vllm_start"), "WORKER", "tests.contract.failing_worker.FailingLoader"
        )
        return await open_engine("vllm", model, dtype)


def _module(name: str) -> Any:
    with warnings.catch_warnings():
        # Imported here for the first time, torch and transformers warn of deprecations among themselves.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return importlib.import_module(f"server.engines.{name}")


async def open_engine(kind: str, model: Path, dtype: str = "float32") -> Engine:
    """An engine for tests: small."""
    settings = EngineSettings(model=str(model), dtype=dtype, seed=0, kv_cache_gib=0.25)
    return await _module(kind).open_engine(settings)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def transformers_session(tiny_math: Path) -> AsyncIterator[Engine]:
    engine = await open_engine("transformers", tiny_math)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_session(tiny_math: Path) -> AsyncIterator[Engine]:
    before = set(multiprocessing.active_children())
    engine = await open_vllm(tiny_math)
    yield engine
    await engine.close()
    assert set(multiprocessing.active_children()) == before


@pytest.fixture(
    scope="session", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def engine_session(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(f"{request.param}_session")


@pytest.fixture(scope="session")
def initial_weights(tiny_math: Path) -> Weights:
    """The checkpoint that the engines start with, as version 0."""
    return Weights(version=0, digest="initial", files=(tiny_math / "model.safetensors",))


@pytest_asyncio.fixture(loop_scope="session")
async def engine(engine_session: Engine, initial_weights: Weights) -> AsyncIterator[Engine]:
    """Each engine in turn, at version 0 when the test starts; a test may load other weights."""
    yield engine_session
    if engine_session.version != 0:
        await engine_session.load_weights(initial_weights)


@pytest_asyncio.fixture(loop_scope="session")
async def vllm_engine(vllm_session: Engine, initial_weights: Weights) -> AsyncIterator[Engine]:
    """The vLLM engine alone, at version 0 when the test starts."""
    yield vllm_session
    if vllm_session.version != 0:
        await vllm_session.load_weights(initial_weights)
