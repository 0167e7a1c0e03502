"""One real server process, without Redis, for every test of the HTTP face."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import running_server


@pytest.fixture(scope="session")
def server_url(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of the tiny maths model on the transformers engine."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(tiny_math, log, "--engine", "transformers", "--dtype", "float32") as server:
        yield server.url
