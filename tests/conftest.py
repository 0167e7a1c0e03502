"""Fixtures that every test may use: the shared folder's data and models, and a real Redis."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_s3 import FakeS3, running_fake_s3
from support import running_redis

# Before torch is imported: more threads than cores that are free make it many times slower, not faster.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared"
"""Data, models and golden numbers beside the checkout; not the project's own `shared/` package."""


def pytest_configure() -> None:
    """A shell that starts tests in the background lets them ignore Ctrl-C, which some of them send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """A test that leaves asyncio's empty handler behind would make a later one hang that sends Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before or signal.default_int_handler)
    # Fixtures that are torn down in another loop may leave a loop's own one, which raises KeyboardInterrupt.
    assert getattr(after, "__name__", "") != "_sighandler_noop", (
        "the test left Ctrl-C without effect"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where vLLM cannot be installed its tests say so; in CI they fail instead."""
    if importlib.util.find_spec("vllm") is None and os.environ.get("CI") != "true":
        missing = pytest.mark.skip(reason="vLLM is not installed: `make setup` says why")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(missing)


def _material(relative: str) -> Path:
    path = MATERIAL / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers from the authors' implementation."""
    return _material("golden")


@pytest.fixture(scope="session")
def tiny_math() -> Path:
    """A trained Qwen2-shaped model of 0.8 M parameters that runs in both engines."""
    return _material("models/tiny_math")


@pytest.fixture(scope="session")
def stories() -> Path:
    """A trained Llama-shaped model of 0.3 M parameters, for transformers only (head size 8)."""
    return _material("models/stories260k")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder of GSM8K's train.jsonl and test.jsonl."""
    return _material("data/gsm8k")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a real redis-server that lives as long as the test session."""
    with running_redis() as server:
        yield server.url


@pytest.fixture(scope="session")
def fake_s3() -> Iterator[FakeS3]:
    """An emulator of S3 on a real socket that lives as long as the test session."""
    with running_fake_s3() as fake:
        yield fake
