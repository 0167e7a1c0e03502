"""The commands as a user types them: what they print, how they fail, and that nothing outlives them."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import free_port, running_server

from shared.coordination import RedisCoordinator

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "trainer.steps=1", "rollout.questions=4",
    "evaluation.questions=8", "evaluation.samples=2", "evaluation.every=0",
]  # fmt: skip


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
        env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip


def spoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "trainer.cli", *arguments)


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("spoke")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def server(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "server", *arguments)


def test_a_server_without_its_model_says_so(tmp_path: Path) -> None:
    done = server("--model", str(tmp_path / "none"), "--port", "0")
    assert_one_clear_line(done, str(tmp_path / "none"), "no such checkpoint")


def test_a_server_with_a_broken_model_says_so(tmp_path: Path, tiny_math: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_math, broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").write_bytes(whole[:1000])
    done = server("--model", str(broken), "--port", "0", "--engine", "transformers")
    assert_one_clear_line(done, str(broken))


def test_a_port_in_use_is_said_before_the_model_is_loaded(tiny_math: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = server("--model", str(tiny_math), "--port", port)
    assert_one_clear_line(done, port, "in use", "--port")


def test_a_redis_that_is_down_is_said_by_everyone(tiny_math: Path, tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    where = ["--redis-url", url, "--run", "r"]
    patience = ["--redis-wait", "0"]
    done = server("--model", str(tiny_math), "--port", "0", *where, *patience)
    assert_one_clear_line(done, url, "does not answer")
    assert_one_clear_line(spoke("fleet", *where), url)
    assert_one_clear_line(spoke("push", str(tiny_math), *where, "--store", str(tmp_path)), url)
    train = ["train", "configs/quickstart.toml", "--run-dir", str(tmp_path / "run")]
    assert_one_clear_line(spoke(*train, "--set", f"fleet.redis_url={url}"), url)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none.toml", "--run-dir", "x"], ["none.toml"]),
        (["train", "configs/quickstart.toml", "--run-dir", "x", "--set", "trainer.step=3"], ["'steps'"]),
        (["train", "configs/quickstart.toml", "--run-dir", "{tmp}"], ["fleet.redis_url"]),
        (["eval", "--server", "http://127.0.0.1:1", "--data", "none.jsonl"], ["none.jsonl"]),
        (["eval", "--server", "http://x", "--data", "problems:heldout", "--k", "5"], ["--k 5", "4"]),
        (["eval", "--server", "http://x", "--data", "problems:heldout", "--resume"], ["--out"]),
        (["eval", "--server", "http://x", "--data", "problems:heldout", "--prompt", "x"], ["{question}"]),
        (["eval", "--server", "http://x", "--data", "problems:heldout", "--temperature", "9"], ["temperature"]),
        (["tree", "--server", "http://x", "--prompt", "x", "--branch-factors", "a"], ["--branch-factors a"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    done = spoke(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert_one_clear_line(done, *words)


async def test_a_second_trainer_of_a_run_is_refused(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.coordination.LEASE_S", 600)  # the other trainer lives on
    coordinator = RedisCoordinator(redis_url, "held")
    await coordinator.acquire_lease("another:1")
    await coordinator.close()
    train = [
        "train",
        "configs/quickstart.toml",
        "--run-dir",
        str(tmp_path / "run"),
        "--set",
        "run=held",
    ]
    done = await asyncio.to_thread(spoke, *train, "--set", f"fleet.redis_url={redis_url}")
    assert_one_clear_line(done, "another:1", "held")


def test_a_run_folder_is_not_trained_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    done = spoke("train", "configs/quickstart.toml", "--run-dir", str(tmp_path))
    assert_one_clear_line(done, str(tmp_path), "--resume")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_is_stopped_leaves_the_fleet_at_once(
    tiny_math: Path, redis_url: str, tmp_path: Path, sent: signal.Signals
) -> None:
    follow = ["--engine", "transformers", "--redis-url", redis_url, "--run", "leaving"]
    coordinator = RedisCoordinator(redis_url, "leaving")
    with running_server(tiny_math, tmp_path / "server.log", *follow) as stopping:
        assert [r.url for r in await coordinator.servers()] == [stopping.url]
        stopping.process.send_signal(sent)
        assert await asyncio.to_thread(stopping.process.wait, 20) == 0
        assert await coordinator.servers() == []
    await coordinator.close()


def test_tree_prints_text_values_and_advantages(transformers_server: Any) -> None:
    ask = [
        "tree",
        "--server",
        transformers_server.url,
        "--prompt",
        "Ana has 12 apples. She buys 5 more. How many?\\n",
    ]
    done = spoke(*ask, "--reference", "17", "--branch-factors", "2,2", "--segment-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("V=") >= 3
    assert "A=" in done.stdout
    assert "tokens sampled" in done.stdout
    answer = json.loads(spoke(*ask, "--json").stdout)
    assert answer["nodes"][0]["value"] is None
    unknown = spoke(*ask, "--reference", "17", "--reward", "gsm9k")
    assert_one_clear_line(unknown, "reward.name", "gsm8k")


def evaluation(url: str, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "eval", "--server", url, "--data", str(data), "--samples", "2", "--max-tokens", "24",
        "--out", str(out), *more,
    ]  # fmt: skip


def test_eval_keeps_every_sample_and_prints_a_table(
    transformers_server: Any, gsm8k: Path, tmp_path: Path
) -> None:
    url, data, out = transformers_server.url, gsm8k / "test.jsonl", tmp_path / "out"
    one = spoke(*evaluation(url, data, out, "--questions", "3"))
    assert one.returncode == 0, one.stderr
    for part in ("3 questions x 2 samples", "pass@1", "pass@2", "majority@2", "unfinished"):
        assert part in one.stdout
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6
    again = evaluation(url, data, out, "--questions", "4", "--json")
    assert_one_clear_line(spoke(*again), str(out), "--resume")
    assert_one_clear_line(spoke(*again, "--resume", "--seed", "5"), "seed = 0, not 5")
    more = spoke(*again, "--resume", "--k", "2")
    assert more.returncode == 0, more.stderr
    found = json.loads(more.stdout)
    assert (found["questions"], list(found["pass_at"])) == (4, ["2"])
    assert found == json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sorted((line["question_id"], line["sample"]) for line in lines) == [
        (str(q), s) for q in range(4) for s in range(2)
    ]
    assert {line["server"] for line in lines} == set(found["servers"])
    assert all(line["response"] and 0 < line["tokens"] <= 24 for line in lines)


def test_eval_of_a_run_finds_its_servers_and_fleet_shows_them(
    transformers_server: Any, gsm8k: Path, tmp_path: Path
) -> None:
    where = ["--redis-url", transformers_server.redis_url, "--run", transformers_server.run]
    data = ["--data", str(gsm8k / "test.jsonl"), "--questions", "1", "--samples", "1"]
    many = spoke("eval", *where, *data, "--max-tokens", "16", "--out", str(tmp_path / "out"))
    assert many.returncode == 0, many.stderr
    fleet = spoke("fleet", *where)
    assert fleet.returncode == 0
    assert transformers_server.url in fleet.stdout
    assert "ready" in fleet.stdout


def test_eval_goes_on_without_a_refused_question_and_says_so(
    transformers_server: Any, tmp_path: Path
) -> None:
    """A reference without a number cannot be graded: the server refuses that question, and no other."""
    data = tmp_path / "a.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": "none" if i == 1 else str(i)} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = spoke(*evaluation(transformers_server.url, data, tmp_path / "out"))
    assert done.returncode == 1, done.stderr
    assert "2 questions x 2 samples" in done.stdout
    assert "1 questions were refused" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(r["question_id"], r["field"]) for r in summary["refused"]] == [
        ("1", "reward.reference")
    ]
    all_refused = spoke(
        *evaluation(transformers_server.url, data, tmp_path / "no", "--reward", "gsm9k")
    )
    assert_one_clear_line(all_refused, "reward.name", "gsm8k")
    assert not (tmp_path / "no").exists()


def test_eval_that_is_interrupted_keeps_its_samples_and_goes_on(
    transformers_server: Any, gsm8k: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = evaluation(
        transformers_server.url, gsm8k / "test.jsonl", out, "--questions", "400", "--json"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", *command], stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # As a terminal starts it: tests that run in the background have SIGINT ignored, and so would it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        samples = out / "samples.jsonl"
        wait_until(lambda: samples.exists() or process.poll() is not None, 60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert f"of 400 questions are in {out}: the same command with --out {out} --resume" in said
    assert "Traceback" not in said
    kept = samples.read_text()
    assert 0 < len(kept.splitlines()) < 800
    fewer = [*command, "--resume"]
    fewer[fewer.index("400")] = "8"
    samples.write_text(kept + kept[:50])
    done = spoke(*fewer)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["questions"] == 8
    assert samples.read_text().startswith(kept)


def quickstart(folder: Path, *settings: str) -> list[str]:
    chosen = [part for setting in (*QUICK, *settings) for part in ("--set", setting)]
    return [sys.executable, "-m", "trainer.cli", "quickstart", "--run-dir", str(folder), *chosen]


@pytest.mark.slow
def test_the_quickstart_trains_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = subprocess.run(
        quickstart(tmp_path / "run"), capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "Held-out accuracy",
        "sampled tokens in training",
        "server-2 reached version",
        "learning_curve.png",
    ):
        assert word in done.stdout
    assert (tmp_path / "run" / "learning_curve.png").is_file()
    assert not mentions(str(tmp_path))


@pytest.mark.slow
def test_without_redis_server_fakeredis_stands_in_and_says_so(tmp_path: Path) -> None:
    path = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not Path(folder, "redis-server").exists()
    )
    done = subprocess.run(
        quickstart(tmp_path / "run"), capture_output=True, text=True, timeout=240, cwd=ROOT,
        env=os.environ | {"PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fakeredis' TCP server stands in" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)],
    ids=lambda s: str(s),
)
def test_a_quickstart_that_is_stopped_leaves_nothing_running(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    log = tmp_path / "out.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            quickstart(tmp_path / "run", "trainer.steps=500"), stdout=stream, stderr=stream, cwd=ROOT,
            # As a terminal starts it: tests that run in the background have SIGINT ignored, and so would it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        wait_until(lambda: b"servers ready" in log.read_bytes() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        assert mentions(str(tmp_path))
        process.send_signal(sent)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not mentions(str(tmp_path)), 20)
    assert b"Traceback" not in log.read_bytes()


def mentions(text: str) -> list[str]:
    """Processes that write their log into a folder, by what the kernel says of their standard output."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text in os.readlink(entry / "fd" / "1") and entry.name != str(os.getpid()):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue  # it ended while we looked
    return found


def wait_until(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
