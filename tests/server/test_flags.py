"""What the command line may not say is refused in one line that names the flag, before anything is loaded."""

from pathlib import Path

import pytest

from server.__main__ import settings
from shared.errors import ConfigError

BAD = [
    *[(flag, number) for flag in (
        "--reward-workers", "--max-nodes-in-flight", "--max-tokens-in-flight", "--max-tree-nodes",
        "--max-tree-tokens", "--max-depth", "--max-leaves", "--max-batch", "--max-model-len", "--threads",
        "--reward-http-batch", "--reward-http-connections",
    ) for number in ("0", "-1")],
    *[(flag, number) for flag in (
        "--reward-timeout", "--reward-memory-gib", "--liveness-timeout", "--reward-http-timeout",
        "--max-body-mib", "--kv-cache-gib", "--gpu-memory-utilization",
    ) for number in ("0", "-0.5", "nan", "inf")],
    ("--redis-wait", "-1"), ("--redis-wait", "inf"), ("--max-lag", "-1"),
    ("--drain", "-1"), ("--drain", "nan"), ("--max-depth", "17"), ("--port", "65536"), ("--port", "-1"),
    ("--gpu-memory-utilization", "1.5"),
    *[("--advertise-url", url) for url in (
        "", "host:8000", "ftp://host", "http://", "http://host:99999", "http://host:0", "http://a b",
        "http://host/?a", "http://host\n",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_what_no_server_can_work_with_is_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} ") as refused:
        settings(["--model", "m", f"{flag}={value}"])
    assert "must" in str(refused.value)


def test_what_servers_are_started_with_is_taken() -> None:
    flags = ["--port=0", "--drain=0", "--max-depth=16", "--advertise-url=https://[::1]:8000/spoke"]
    chosen = settings(["--model", "m", *flags])
    assert (chosen.port, chosen.drain_s, chosen.limits.depth) == (0, 0.0, 16)
    assert chosen.advertise_url == "https://[::1]:8000/spoke"
    assert chosen.max_nodes_in_flight is None
    assert chosen.peers
    assert not settings(["--model", "m", "--no-peers"]).peers


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--weights-dir .*file/versions: Not a directory; give a folder"
    ):
        settings(["--model", "m", f"--weights-dir={tmp_path / 'file' / 'versions'}"])
    settings(["--model", "m", f"--weights-dir={tmp_path / 'versions'}"])
    assert list((tmp_path / "versions").iterdir()) == []
