"""The fleet table of `spoke fleet` and `spoke push`, and where a push says that its version lies."""

import asyncio
import io
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from shared.coordination import RedisCoordinator
from shared.fleet import Head, ServerRecord, ServerState
from trainer.cli import main
from trainer.commands.fleet import show

HEAD = Head(version=42, manifest_digest="m", weights_digest="w", store="s", max_staleness=1)


def record(name: str, version: int, digest: str, error: str | None = None) -> ServerRecord:
    state = ServerState.STALE if error else ServerState.READY
    return ServerRecord(
        server_id=name, url=f"https://{name}.region-1.gpu-provider.example:8000", state=state, version=version,
        digest=digest, model="Qwen/Qwen2.5-1.5B", engine="vllm", last_error=error, updated_at=0.0,
    )  # fmt: skip


def shown(head: Head | None, *records: ServerRecord, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal, color_system=None)
    show(head, list(records), console)
    return stream.getvalue()


def cells(text: str, name: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f"│ {name}"))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_a_row_says_how_far_behind_a_server_is_and_errors_have_a_line_of_their_own() -> None:
    error = "version 42: a full disk: 1.2 GB are missing at /srv/weights, which holds versions 30 to 38 [disk]"
    text = shown(HEAD, record("s1", 42, "w"), record("s2", 38, "v", error), record("s3", 0, ""))
    assert cells(text, "s1")[2:5] == ["ready", "42", "0"]
    assert cells(text, "s2")[2:5] == ["stale", "38", "4"]
    assert cells(text, "s3")[2:5] == ["ready", "checkpoint", ""]
    assert f"s2: {error}" in text.splitlines()


def test_a_pipe_gets_whole_addresses_and_a_narrow_terminal_all_of_their_characters() -> None:
    one = record("s1", 42, "w")
    assert cells(shown(HEAD, one), "s1")[1] == one.url
    narrow = shown(HEAD, one, terminal=True)
    assert max(map(len, narrow.splitlines())) <= 80
    column = [line.strip("│").split("│")[1].strip() for line in narrow.splitlines() if "│" in line]
    assert "".join(column) == one.url


def test_before_the_first_version_and_without_servers() -> None:
    assert cells(shown(None, record("s1", 0, "")), "s1")[3:5] == ["0", ""]
    assert shown(HEAD) == "no server is alive\n"


def test_a_push_announces_the_store_as_servers_reach_it(
    redis_url: str, tiny_math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"run-{uuid.uuid4().hex}"
    url = "https://weights.example"
    arguments = [
        "push", str(tiny_math), "--redis-url", redis_url, "--run", run, "--store", f"file://{tmp_path}",
        "--advertise-store", url, "--wait", "5",
    ]  # fmt: skip

    async def head() -> Head | None:
        coordinator = RedisCoordinator(redis_url, run)
        try:
            return await coordinator.head()
        finally:
            await coordinator.close()

    assert main(arguments) == 0
    assert "no server is alive" in capsys.readouterr().out
    found = asyncio.run(head())
    assert found is not None
    assert (found.version, found.store) == (0, url)
    assert (tmp_path / run / "v000000" / "manifest.json").is_file()
