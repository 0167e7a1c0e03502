"""Rewards of a real server process: its flags reach what they are about; a reward server that is down is named."""

import httpx
import pytest
from support import free_port, running_server

OWN = """
import resource

def memory(response, reference, options):
    return resource.getrlimit(resource.RLIMIT_AS)[0] / 2**30
"""


@pytest.mark.slow
def test_a_server_bounds_its_rewards_memory_and_says_which_of_them_is_down(
    tiny_math, tmp_path, monkeypatch
):
    (tmp_path / "own_memory.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--engine", "transformers", "--reward", "memory=own_memory:memory"]
    flags += ["--reward", f"judge=http://127.0.0.1:{free_port()}/grade"]
    monkeypatch.setenv("SPOKE_REWARD_TOKEN_JUDGE", "s3cret-of-the-judge")
    flags += ["--reward-memory-gib", "0.75", "--reward-workers", "1"]
    body = {
        "prompt": "Tom has 3 apples and buys 4 more.",
        "plan": {"kind": "group", "samples": 2},
        "sampling": {"max_tokens": 200, "temperature": 0.0},
        "reward": {"name": "memory", "reference": ""},
    }
    with running_server(tiny_math, tmp_path / "log", *flags) as server:
        answer = httpx.post(f"{server.url}/rollout_tree", json=body, timeout=60.0)
        assert answer.status_code == 200, answer.text
        leaves = [n for n in answer.json()["nodes"] if n["finish_reason"] == "stop"]
        assert leaves
        assert {leaf["reward"] for leaf in leaves} == {0.75}
        body["reward"] = {"name": "judge", "reference": "7"}
        answer = httpx.post(f"{server.url}/rollout_tree", json=body, timeout=60.0)
        assert (answer.status_code, answer.json()["field"]) == (503, "reward.name")
        assert answer.headers["Retry-After"]
        assert "s3cret" not in answer.text + server.log.read_text()
