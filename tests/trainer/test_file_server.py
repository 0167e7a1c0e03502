"""The trainer's file server: what it hands out, to whom, and that it lives and dies with the trainer."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support import free_port, on_a_socket
from versions import RUN, Versions

from shared.errors import ConfigError
from shared.fsspec_store import FsspecStore
from shared.http_store import HttpStore
from trainer.cli import main
from trainer.commands.store import token_for
from trainer.file_server import create_app
from trainer.serving import address, announced
from trainer.settings import FleetSettings

TOKEN = "store-0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ROOT = Path(__file__).resolve().parents[2]
FILE = f"/{RUN}/v000000/weights-0.safetensors"


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    made = Versions(tmp_path)
    made.publish()
    return made


async def test_files_are_served_whole_and_in_part(versions: Versions) -> None:
    data = (versions.folder(0) / "weights-0.safetensors").read_bytes()
    async with (
        on_a_socket(create_app(versions.root, TOKEN)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=BEARER) as client,
    ):
        whole = await client.get(FILE)
        assert (whole.status_code, whole.content) == (200, data)
        part = await client.get(FILE, headers={"Range": "bytes=299990-"})
        assert (part.status_code, part.content) == (206, data[299_990:])
        head = await client.head(FILE)
        assert (head.status_code, head.headers["content-length"]) == (200, "300000")
        beyond = await client.get(FILE, headers={"Range": "bytes=300000-"})
        assert beyond.status_code == 416
        for version in (1, 2, 3):
            versions.publish()
            await client.get(f"/{RUN}/v{version:06d}/delta-0.zst")
            await client.get(f"/{RUN}/v{version:06d}/manifest.json")
        said = [
            line
            for line in (await client.get("/metrics")).text.splitlines()
            if "bytes_total{" in line
        ]
        name = "spoke_store_sent_bytes_total"
        assert f'{name}{{kind="full",run="{RUN}"}} 300010.0' in said
        assert f'{name}{{kind="delta",run="{RUN}"}} 60000.0' in said
        assert len(said) == 3, "a series for each version would never end"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_nothing_can_be_written(versions: Versions, method: str) -> None:
    async with (
        on_a_socket(create_app(versions.root, TOKEN)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=BEARER) as client,
    ):
        assert (await client.request(method, FILE, content=b"x")).status_code == 405


async def test_nothing_else_is_handed_out(versions: Versions, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = versions.folder(0)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "more").mkdir()
    (folder / "manifest.json.12345678.partial").write_text("secret")
    (versions.root / RUN / "notes").mkdir()
    (versions.root / RUN / "notes" / "a").write_text("secret")
    paths = [
        "/", f"/{RUN}", f"/{RUN}/", f"/{RUN}/v000000", f"/{RUN}/v000000/", f"/{RUN}/v000000/more",
        f"/{RUN}/v000000/link", f"/{RUN}/v000000/manifest.json.12345678.partial", f"/{RUN}/notes/a",
        f"/{RUN}/v000000/..", f"/{RUN}/v000000/../../../secret", f"/{RUN}/v000000/%2e%2e%2fv000000",
        f"/{RUN}/v000000/..%2f..%2f..%2fsecret", "/../secret/v000000/a", f"/{RUN}/v0/weights-0.safetensors",
        f"/{RUN}/v000000/%00", "/%2e%2e/v000000/secret", f"/{RUN}/v000009/manifest.json",
    ]  # fmt: skip
    async with on_a_socket(create_app(versions.root, TOKEN)) as port:
        for path in paths:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)  # as it is written
            lines = [f"GET {path} HTTP/1.1", "Host: a", f"Authorization: Bearer {TOKEN}"]
            writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await writer.wait_closed()
            assert answer.startswith(b"HTTP/1.1 404"), (path, answer)
            assert b"secret" not in answer


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer another-0123456789abcdef"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
    ],
)
async def test_the_token_is_asked_for(versions: Versions, headers: dict[str, str]) -> None:
    async with (
        on_a_socket(create_app(versions.root, TOKEN)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client,
    ):
        for path in (FILE, "/metrics", "/nothing"):
            answer = await client.get(path)
            assert answer.status_code == 401
            assert answer.headers["content-type"] == "application/problem+json"
            assert TOKEN not in answer.text
        assert (await client.get("/livez")).status_code == 200


def test_beyond_loopback_there_must_be_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOKE_STORE_TOKEN", raising=False)
    assert token_for("auto", "127.0.0.1") is None
    assert token_for("off", "0.0.0.0") is None
    for auth, host in (("auto", "0.0.0.0"), ("on", "127.0.0.1")):
        with pytest.raises(ConfigError, match="SPOKE_STORE_TOKEN"):
            token_for(auth, host)
    monkeypatch.setenv("SPOKE_STORE_TOKEN", TOKEN)
    assert token_for("auto", "0.0.0.0") == TOKEN
    monkeypatch.setenv("SPOKE_STORE_TOKEN", "short")
    with pytest.raises(ConfigError, match="fewer than 16"):
        token_for("auto", "127.0.0.1")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["8100", ":8100", "host:", "host:x", "host:70000", "host:-1"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"fleet\.serve_at .* HOST:PORT"):
        address(text, None)


def test_servers_must_know_how_to_reach_it() -> None:
    with pytest.raises(ConfigError, match=r"fleet\.advertise_store"):
        address("0.0.0.0:8100", None)
    assert address("0.0.0.0:8100", "http://trainer:8100").port == 8100
    assert address("[::1]:8100", None).url == "http://[::1]:8100"


async def test_a_training_run_serves_its_store(
    versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOKE_STORE_TOKEN", TOKEN)
    settings = FleetSettings(serve_at="127.0.0.1:0")
    async with announced(settings, versions.store, tmp_path) as url:
        store = HttpStore(url, RUN, token=TOKEN)
        assert await asyncio.to_thread(store.manifest, 0) == versions.manifests[0]
        store.close()
        pid = int((await asyncio.to_thread(httpx.get, f"{url}/livez")).text)
        os.kill(pid, signal.SIGKILL)  # it comes back by itself, at the same address
        again = HttpStore(url, RUN, token=TOKEN, tries=1)
        async with asyncio.timeout(30):
            while not await asyncio.to_thread(_answers, again):
                await asyncio.sleep(0.05)
        again.close()
    with pytest.raises(httpx.ConnectError):
        await asyncio.to_thread(httpx.get, f"{url}/livez")


async def test_a_file_server_that_cannot_be_started_again_is_tried_again(
    versions: Versions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    async with announced(FleetSettings(serve_at="127.0.0.1:0"), versions.store, folder) as url:
        pid = int((await asyncio.to_thread(httpx.get, f"{url}/livez")).text)
        folder.rename(away)  # its log cannot be opened
        os.kill(pid, signal.SIGKILL)
        again = HttpStore(url, RUN, tries=1)
        async with asyncio.timeout(30):
            while "not started again" not in caplog.text:
                await asyncio.sleep(0.05)
            away.rename(folder)
            while not await asyncio.to_thread(_answers, again):
                await asyncio.sleep(0.05)
        again.close()


def _answers(store: HttpStore) -> bool:
    try:
        return bool(store.manifest(0).files)
    except Exception:  # the test's own loop: it is not there yet
        return False


async def test_a_store_elsewhere_is_not_served(tmp_path: Path) -> None:
    settings = FleetSettings(serve_at="127.0.0.1:0")
    with pytest.raises(ConfigError, match="no folder of this machine"):
        async with announced(settings, FsspecStore("memory://a", RUN), tmp_path):
            pass
    secret = FsspecStore("memory://a", RUN)
    secret.given = "sftp://me:secret@host/a"
    for settings in (FleetSettings(), FleetSettings(advertise_store="sftp://me:secret@host/a")):
        with pytest.raises(
            ConfigError, match=r"'sftp://host/a': its password.*advertise_store"
        ) as error:
            async with announced(settings, secret, tmp_path):
                pass
        assert "secret" not in str(error.value)
    plain = FleetSettings(store="memory://a", advertise_store="s3://bucket/a")
    async with announced(plain, FsspecStore("memory://a", RUN), tmp_path) as url:
        assert url == "s3://bucket/a"


async def test_a_port_that_is_taken_is_said(versions: Versions, tmp_path: Path) -> None:
    async with on_a_socket(create_app(versions.root, None)) as port:
        settings = FleetSettings(serve_at=f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=r"does not start: .*in use"):
            async with announced(settings, versions.store, tmp_path):
                pass


def test_it_dies_with_a_trainer_that_is_killed(versions: Versions, tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from trainer.serving import Address, serving\n"
        "async def main():\n"
        "    async with serving(Path(sys.argv[1]), Address('127.0.0.1', int(sys.argv[2])), Path(sys.argv[3])):\n"
        "        print('served', flush=True)\n"
        "        await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, str(versions.root), str(port), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"served\n"
        pid = int(httpx.get(f"http://127.0.0.1:{port}/livez").text)
        assert pid != trainer.pid
        trainer.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
