"""`spoke-server grade` as a user types it, with real worker processes: nothing is lost for a bad line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.__main__ import parser
from server.grade_lines import parse_line

ROOT = Path(__file__).resolve().parents[2]

OWN = '''
import os, time
from shared.errors import RequestError

def own(response, reference, options):
    """Does what the response says; else compares, with a scale."""
    print("a word for people")
    if reference == "refused": raise RequestError("reward.reference", "not this one")
    if response == "raise": raise ValueError("on purpose")
    if response == "die": os._exit(3)
    if response == "slow": time.sleep(60)
    if response == "calls": return float(os.getpid())
    return float(response == reference) * options.get("scale", 1.0)
'''


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server", "grade", *arguments]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "own_reward.py").write_text(OWN)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def grade(environment, *arguments, text=""):
    return subprocess.run(
        command(*arguments), input=text, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=environment,
    )  # fmt: skip


def lines(*objects) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def line(response, reference="72", **more):
    return {"response": response, "reference": reference} | more


def results(done) -> list[dict]:
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_lines_come_back_in_order_with_every_field(environment, tmp_path):
    given = [
        line(f"é #### {i % 3}", str(i // 7 % 3), id=i, extra={"deep": [i]}) for i in range(200)
    ]
    (tmp_path / "in.jsonl").write_text(lines(*given), "utf-8")
    done = grade(environment, "--reward", "gsm8k", str(tmp_path / "in.jsonl"))
    assert done.returncode == 0, done.stderr
    expected = [
        one | {"reward": float(i % 3 == i // 7 % 3), "reward_error": None}
        for i, one in enumerate(given)
    ]
    assert results(done) == expected
    mean = sum(one["reward"] for one in expected) / 200
    assert f"200 lines graded, mean reward {mean:.4g}" in done.stderr
    assert "é" in done.stdout


def test_nothing_is_lost_for_bad_lines(environment):
    text = (
        lines(line("#### 72"))
        + "{broken\n\n"
        + lines([1], {"response": "#### 72"}, line("#### 72", 72), line("#### 72", options=[]))
        + json.dumps(line("#### 72 \ud800"))  # half a pair, and no newline at the end
    )
    done = grade(environment, "--reward", "gsm8k", "-", text=text)
    assert done.returncode == 1
    found = results(done)
    assert [one["reward"] for one in found] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert [one["reward_error"] for one in found] == [
        None,
        "line 5: no field 'reference'",
        "line 6: field 'reference' is 72, not a string",
        "line 7: field 'options' is [], not an object",
        None,
    ]
    said = done.stderr.splitlines()
    assert said[0].startswith("spoke-server grade: line 2: not JSON: ")
    assert said[1] == "spoke-server grade: line 4: not a JSON object"
    assert said[2].endswith("2 lines graded, mean reward 1; 5 could not be graded")
    assert len(said) == 3


def test_what_a_reward_does_costs_its_own_line(environment):
    given = [
        line("72"), line("raise"), line("die"), line("slow"), line("72", options={"scale": 0.5}),
        line("72", "refused"), line("72"),
    ]  # fmt: skip
    arguments = ["--reward", "own=own_reward:own", "--reward-timeout", "0.5", "-"]
    done = grade(environment, *arguments, text=lines(*given))
    assert done.returncode == 0, done.stderr
    found = results(done)
    assert [one["reward"] for one in found] == [1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 1.0]
    errors = [one["reward_error"] for one in found]
    assert errors[1:4] == [
        "ValueError: on purpose",
        "its process died (exit code 3)",
        "took longer than its limit of 0.5 s",
    ]
    assert errors[5] == "reward.reference: not this one"
    assert (errors[0], errors[4], errors[6]) == (None, None, None)
    assert "7 lines graded, mean reward 0.3571, 4 with a reward_error" in done.stderr


def test_what_a_reward_prints_does_not_mix_with_the_lines(environment):
    done = grade(environment, "--reward", "own=own_reward:own", "-", text=lines(line("72")))
    assert results(done) == [line("72") | {"reward": 1.0, "reward_error": None}]


def test_workers_are_as_many_as_asked_for(environment):
    text = lines(*(line("calls", str(i)) for i in range(20)))
    arguments = ["--reward", "own=own_reward:own", "--reward-workers", "1", "-"]
    assert len({one["reward"] for one in results(grade(environment, *arguments, text=text))}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "gsmk8", "-"], "--reward gsmk8: no reward 'gsmk8'; did you mean 'gsm8k'?"),
        (["--reward", "own=own_reward", "-"], "write NAME=package.module:function"),
        (["--reward", "gsm8k=own_reward:own", "-"], "'gsm8k' is built in"),
        (["--reward", "own=own_reward:none", "-"], "cannot be used: AttributeError"),
        (["--reward", "gsm8k", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["--reward", "gsm8k", "."], ".: Is a directory"),
        (["--reward", "gsm8k", "--reward-workers", "0", "-"], "--reward-workers"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(environment, arguments, message):
    done = grade(environment, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    (said,) = (text for text in done.stderr.splitlines() if text.startswith("spoke-server"))
    assert message in said
    assert "Traceback" not in done.stderr


def test_lines_stream_and_an_interrupt_ends_it_at_once(environment):
    process = subprocess.Popen(
        command("--reward", "gsm8k", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, cwd=ROOT, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in (1, 2):  # each answer comes while the input is still open
            process.stdin.write(lines(line(f"#### {number}", "2")).encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["reward"] == float(number == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_reader_that_has_seen_enough_ends_it(environment, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines(*(line("x" * 1000, str(i)) for i in range(2000))))
    process = subprocess.Popen(
        command("--reward", "gsm8k", str(tmp_path / "in.jsonl")), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=ROOT, env=environment,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("raw", [b"\xff{}", b"[" * 100_000, b"nul", b'"text"', b"9" * 5000])
def test_whatever_stands_in_a_line_it_is_only_a_line(raw):
    line = parse_line(7, raw)
    assert not line.readable
    assert line.fields is None
    assert line.error is not None
    assert line.error.startswith("line 7: not ")


def test_the_servers_own_command_line_is_as_it_was():
    args = parser().parse_args(["--model", "grade"])
    assert args.model == "grade"
    assert "spoke-server grade" in parser().format_help()
