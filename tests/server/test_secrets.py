"""Tokens and Redis passwords show up nowhere: not in logs, errors, /info, run folders or process arguments.

1. A real server on a real Redis with a password, and with tokens, through everything that goes wrong around it.
2. Redis over TLS, its certificate checked.
3. A password on a command line is refused, by servers and by every command of the trainer.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support import ServerProcess, free_port, running_server

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, CoordinationError
from shared.redis_url import from_command_line, redacted
from trainer.config import load
from trainer.prepare import open_folder, save_settings

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "redis-s3cret"
TOKEN = "token-s3cret-0123456789"
MARK = "s3cret"
"""In every secret, and nowhere else."""
FOLLOW = ["--engine", "transformers", "--dtype", "float32", "--run", "secrets"]


@dataclass
class Redis:
    """A real redis-server, which may be stopped on the way."""

    port: int
    process: subprocess.Popen[str]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@contextlib.contextmanager
def running_redis(port: int, *arguments: str) -> Iterator[Redis]:
    binary = shutil.which("redis-server")
    assert binary is not None, "redis-server is not on the PATH"
    process = subprocess.Popen(
        [binary, "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD, *arguments],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "Ready to accept connections" in line:
            break
    else:
        pytest.fail(f"redis-server does not start: {arguments}")
    redis = Redis(port=port, process=process)
    try:
        yield redis
    finally:
        redis.stop()
        process.stdout.close()


@pytest.fixture
def locked_redis(tmp_path: Path) -> Iterator[Redis]:
    port = free_port()
    with running_redis(port, "--port", str(port), "--dir", str(tmp_path)) as redis:
        yield redis


def url_of(redis: Redis, password: str = PASSWORD) -> str:
    return f"redis://:{password}@127.0.0.1:{redis.port}/0"


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_bytes().decode()


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for task in Path(f"/proc/{found[-1]}/task").iterdir():
            waiting += map(int, (task / "children").read_text().split())
    return found


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line of ours with the words, and no secret."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("spoke")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert MARK not in done.stdout + done.stderr


def errors_of(server: ServerProcess) -> Iterator[httpx.Response]:
    """Whatever the server answers to those who know its token, and to those who do not."""
    right = {"Authorization": f"Bearer {TOKEN}"}
    group = {"prompt": "x", "plan": {"kind": "group", "samples": 1}}
    for headers in ({}, right, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}):
        for path in (
            "/info",
            "/metrics",
            "/nowhere",
            "/livez",
            "/readyz",
            "/openapi.json",
            "/docs",
        ):
            yield httpx.get(server.url + path, headers=headers)
        for body in ({}, group, group | {"min_weight_version": 99}, group | {"prompt": ""}):
            yield httpx.post(f"{server.url}/rollout_tree", json=body, headers=headers, timeout=60)


@pytest.mark.slow
async def test_a_server_shows_no_secret_whatever_goes_wrong(
    tiny_math: Path, tmp_path: Path, locked_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOKE_REDIS_URL", url_of(locked_redis))
    monkeypatch.setenv("SPOKE_TOKENS", f"{TOKEN} rollout,metrics,admin")
    log = tmp_path / "log"
    with running_server(tiny_math, log, *FOLLOW) as server:
        answers = list(errors_of(server))
        assert {answer.status_code for answer in answers} >= {200, 401, 404, 409, 422}
        coordinator = RedisCoordinator(url_of(locked_redis), "secrets")
        (record,) = await coordinator.servers()
        await coordinator.close()
        processes = family(server.process.pid)
        assert len(processes) > 2, "reward workers are among them"
        shown = [command_line(pid) for pid in processes]
        inherited = [environment(pid) for pid in processes[1:]]
        locked_redis.stop()
        wait_for_line(log, "Redis at")
        if server.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):  # it may be ending
                answers += errors_of(server)
    said = log.read_text()
    assert f"Redis at redis://127.0.0.1:{locked_redis.port}/0 does not answer" in said
    texts = [said, record.model_dump_json(), *shown, *inherited]
    texts += [answer.text + str(answer.headers) for answer in answers]
    assert [text for text in texts if MARK in text] == []


def wait_for_line(log: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://:wrong-{MARK}@127.0.0.1:{{port}}/0", ["127.0.0.1:{port}", "let this client in"]),
        (f"redis://user:wrong-{MARK}@127.0.0.1:{{port}}/0", ["let this client in: invalid username"]),
        (f"redis://127.0.0.1:{{port}}/0?password=wrong-{MARK}", ["password in SPOKE_REDIS_URL"]),
        (f"redis://:{PASSWORD}@127.0.0.1:1/0", ["redis://127.0.0.1:1/0", "does not answer"]),
        (f"redis://:a/{MARK}@127.0.0.1:{{port}}/0", ["%2F"]),
        (f"redis://:{MARK}/b@127.0.0.1:{{port}}/0", ["%2F"]),
        (f"http://:{PASSWORD}@127.0.0.1:{{port}}/0", ["redis://, rediss:// or unix://"]),
        (f"rediss://:{PASSWORD}@127.0.0.1:{{port}}/0", ["does not answer"]),
    ],
)  # fmt: skip
def test_a_redis_that_refuses_costs_no_secret(
    tiny_math: Path, locked_redis: Redis, url: str, words: list[str]
) -> None:
    port = str(locked_redis.port)
    model = ["--model", str(tiny_math), "--port", "0", "--redis-wait", "0", *FOLLOW]
    words = [word.format(port=port) for word in words]
    done = run("-m", "server", *model, SPOKE_REDIS_URL=url.format(port=port))
    assert_refused(done, *words)
    done = run("-m", "trainer.cli", "fleet", "--run", "r", SPOKE_REDIS_URL=url.format(port=port))
    assert_refused(done, *words)


@pytest.mark.slow
def test_passwords_on_a_command_line_are_refused(tiny_math: Path, tmp_path: Path) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:1/0"
    where = ["--run", "r", "--redis-url", url]
    train = ["train", "configs/quickstart.toml", "--run-dir", str(tmp_path / "run")]
    asked = "give this URL in SPOKE_REDIS_URL"
    for done in (
        run("-m", "server", "--model", str(tiny_math), "--port", "0", *where),
        run("-m", "trainer.cli", "fleet", *where),
        run("-m", "trainer.cli", "push", str(tiny_math), *where, "--store", "file:///x"),
        run("-m", "trainer.cli", *train, "--set", f"fleet.redis_url={url}"),
        run("-m", "trainer.cli", *train, "--set", f'fleet={{redis_url="{url}"}}'),
    ):
        assert_refused(done, asked)


def test_the_commands_reach_a_locked_redis_by_the_environment(locked_redis: Redis) -> None:
    done = run("-m", "trainer.cli", "fleet", "--run", "r", SPOKE_REDIS_URL=url_of(locked_redis))
    assert done.returncode == 0, done.stderr
    assert "none announced" in done.stdout


def test_the_argument_goes_before_the_environment() -> None:
    environment = {"SPOKE_REDIS_URL": "redis://:p@there:1/0"}
    assert from_command_line(None, "--redis-url", environment) == "redis://:p@there:1/0"
    assert from_command_line("redis://here:1/0", "--redis-url", environment) == "redis://here:1/0"
    assert from_command_line(None, "--redis-url", {"SPOKE_REDIS_URL": ""}) is None
    for secret in ("redis://:p@h/0", "rediss://u:p@h", "REDIS://u:p@h", "redis://h/0?password=p"):
        with pytest.raises(ConfigError, match="--redis-url: a password"):
            from_command_line(secret, "--redis-url", {})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://user:{MARK}@host:1/0", "redis://host:1/0"),
        (f"redis://:{MARK}@@host:1/0", "redis://host:1/0"),
        (f"unix://user:{MARK}@/run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        (f"rediss://h/0?password={MARK}&username={MARK}", "rediss://h/0"),
        (f"redis://:{MARK}#x@h:1/0", "redis://…"),
        (f"redis://:{MARK}?x@h:1/0", "redis://…"),
        (f"redis://[{MARK}@h:1/0", "redis://…"),
        (f"u:{MARK}@h:1/0", "redis://…"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_run_folders_hold_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ROOT / "configs/quickstart.toml"
    url = f"redis://:{PASSWORD}@h:1/0"
    monkeypatch.setenv("SPOKE_REDIS_URL", url)
    settings = load(config)
    assert settings.fleet.redis_url == url
    assert load(config, ["fleet.redis_url=redis://here/0"]).fleet.redis_url == "redis://here/0"
    open_folder(tmp_path / "run", resume=False)
    save_settings(settings, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["fleet"]["redis_url"] == "redis://h:1/0"
    assert MARK not in repr(settings) + settings.model_dump_json() + str(settings.model_dump())
    monkeypatch.delenv("SPOKE_REDIS_URL")
    stores = [f"fleet.{name}=sftp://me:{MARK}@h/a" for name in ("store", "advertise_store")]
    settings = load(config, stores)
    assert settings.fleet.store == f"sftp://me:{MARK}@h/a"
    open_folder(tmp_path / "other", resume=False)
    save_settings(settings, tmp_path / "other")
    saved = json.loads((tmp_path / "other" / "config.json").read_text())["fleet"]
    assert saved["store"] == saved["advertise_store"] == "sftp://h/a"
    own = tmp_path / "own.toml"
    own.write_text(f'base = "{config}"\n[fleet]\nredis_url = "{url}"\n')
    assert load(own).fleet.redis_url == url


def certificates(folder: Path) -> Path:
    """A certificate authority of its own and a certificate for 127.0.0.1; the authority's file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on the PATH")

    def call(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    new = ["req", "-newkey", "rsa:2048", "-nodes", "-keyout"]
    usage = ["-addext", "keyUsage=critical,keyCertSign"]
    call(*new, "ca.key", "-x509", "-out", "ca.crt", "-subj", "/CN=test ca", "-days", "2", *usage)
    call(*new, "redis.key", "-out", "redis.csr", "-subj", "/CN=redis")
    sign = ["x509", "-req", "-in", "redis.csr", "-CA", "ca.crt", "-CAkey", "ca.key"]
    call(*sign, "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "redis.crt")
    return folder / "ca.crt"


async def test_redis_over_tls_with_its_certificate_checked(tmp_path: Path) -> None:
    authority = certificates(tmp_path)
    port = free_port()
    binary = shutil.which("redis-server")
    assert binary is not None, "redis-server is not on the PATH"
    bare = await asyncio.to_thread(
        subprocess.run, [binary, "--tls-port", str(port), "--port", "0"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    if "Failed to configure TLS" not in bare.stdout:  # that it has no certificate: it can do TLS
        pytest.skip("this redis-server is built without TLS")
    (tmp_path / "other").mkdir()
    stranger = certificates(tmp_path / "other")
    tls = [
        "--tls-cert-file",
        "redis.crt",
        "--tls-key-file",
        "redis.key",
        "--tls-ca-cert-file",
        "ca.crt",
    ]
    own = [
        "--tls-port",
        str(port),
        "--port",
        "0",
        "--tls-auth-clients",
        "no",
        "--dir",
        str(tmp_path),
    ]
    with running_redis(port, *own, *tls):
        base = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0"
        good = RedisCoordinator(f"{base}?ssl_ca_certs={authority}", "tls")
        await good.ping()
        assert await good.acquire_lease("me")
        await good.close()
        for url in (base, f"{base}?ssl_ca_certs={stranger}"):
            bad = RedisCoordinator(url, "tls")
            with pytest.raises(CoordinationError, match="certificate") as refused:
                await bad.ping()
            await bad.close()
            assert MARK not in str(refused.value)
        environment = {"SPOKE_REDIS_URL": f"{base}?ssl_ca_certs={authority}"}
        done = run("-m", "trainer.cli", "fleet", "--run", "tls", **environment)
        assert done.returncode == 0, done.stderr
