"""Fake servers, ended with their test."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fake_rollouts import Fake, FakeServer


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Starts a FakeServer with a script."""
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(FakeServer(script).running())


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whoever runs the tests."""
    monkeypatch.delenv("SPOKE_TOKEN", raising=False)
