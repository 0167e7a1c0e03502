"""Who may ask for what, on a real server that asks for tokens.

1. Without a token 401, with one that lacks the scope 403, both problem documents; probes are open.
2. No scope implies another.
3. Tokens are read strictly, and no error shows one.
4. A server beyond loopback does not start without tokens.
5. What a reward function says of its failure is for `admin`; the reference comes back to nobody.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import websockets.sync.client
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from support import ServerProcess, running_server
from websockets.exceptions import InvalidStatus

from server.app import Holder, create_app
from server.auth import (
    ALL,
    AuthMode,
    Scope,
    enforced,
    granted,
    load_tokens,
    log_auth,
    parse_tokens,
)
from server.details import error_kind, without_details
from server.status import Status
from shared.addresses import is_loopback
from shared.errors import ConfigError
from shared.tree import Node, Role, RolloutTree

ROLLOUT, METRICS, ADMIN, BOTH = (f"{name}-0123456789abcdef" for name in ("r", "m", "a", "b"))
TOKENS = f"{ROLLOUT} rollout; {METRICS} metrics; {ADMIN} admin; {BOTH} rollout,admin"
LEAKY = '''
from shared.errors import RequestError

def leaky(response, reference, options):
    """Quotes the reference wherever it can."""
    if "refuse" in options:
        raise RequestError("reward.reference", f"{reference} is no good")
    raise ValueError(f"expected {reference}")
'''
REFERENCE = "the answer is 4711"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def guarded(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "leaky_reward.py").write_text(LEAKY)
    arguments = ["--engine", "transformers", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPOKE_TOKENS", TOKENS)
        patch.setenv("PYTHONPATH", str(folder))
        own = ["--reward", "leaky=leaky_reward:leaky"]
        with running_server(tiny_math, folder / "log", *arguments, *own) as server:
            yield server


@pytest.mark.parametrize(
    ("path", "needed"),
    [
        ("/info", ROLLOUT),
        ("/rollout_tree", ROLLOUT),
        ("/v1/models", ROLLOUT),
        ("/v1/chat/completions", ROLLOUT),
        ("/nowhere", ROLLOUT),
        ("/", ROLLOUT),
        ("/livez/", ROLLOUT),
        ("//livez", ROLLOUT),
        ("/docs/oauth2-redirect", ROLLOUT),
        ("/metrics", METRICS),
        ("/metrics/", METRICS),
    ],
)
def test_every_path_asks_for_its_scope(guarded: ServerProcess, path: str, needed: str) -> None:
    url = guarded.url + path
    nobody = httpx.get(url)
    assert nobody.headers["www-authenticate"] == 'Bearer realm="spoke"'
    stranger = httpx.get(url, headers=bearer("never-heard-of-0123456789"))
    for answer in (nobody, stranger):
        assert answer.status_code == answer.json()["status"] == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["content-type"] == "application/problem+json"
    assert "invalid_token" in stranger.headers["www-authenticate"]
    for token in {ROLLOUT, METRICS, ADMIN} - {needed}:
        answer = httpx.get(url, headers=bearer(token))
        assert answer.status_code == answer.json()["status"] == 403
        assert "insufficient_scope" in answer.headers["www-authenticate"]
        assert answer.headers["content-type"] == "application/problem+json"
    assert httpx.get(url, headers=bearer(needed)).status_code not in (401, 403)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/openapi.json", "/docs"])
def test_probes_and_documentation_are_open(guarded: ServerProcess, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 200
    assert httpx.get(guarded.url + path, headers=bearer("never-heard-of-it")).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Basic {ROLLOUT}", ROLLOUT, f"Bearer {ROLLOUT}x", f"Bearer {ROLLOUT[:-1]}"],
)  # fmt: skip
def test_other_credentials_are_none(guarded: ServerProcess, header: str) -> None:
    assert httpx.get(f"{guarded.url}/info", headers={"Authorization": header}).status_code == 401


def test_the_scheme_is_read_as_http_reads_it_and_two_headers_are_refused(
    guarded: ServerProcess,
) -> None:
    url = f"{guarded.url}/info"
    assert httpx.get(url, headers={"authorization": f"bEARER {ROLLOUT}"}).status_code == 200
    twice = [("Authorization", f"Bearer {ROLLOUT}")] * 2
    assert httpx.get(url, headers=twice).status_code == 401
    assert httpx.get(url, params={"access_token": ROLLOUT}).status_code == 401


def test_a_body_is_not_read_for_strangers(guarded: ServerProcess) -> None:
    assert httpx.post(f"{guarded.url}/rollout_tree", content=b"{").status_code == 401


def test_websockets_are_refused_whoever_asks(guarded: ServerProcess) -> None:
    url = guarded.url.replace("http:", "ws:") + "/livez"
    for headers in ({}, bearer(BOTH)):
        with pytest.raises(InvalidStatus) as refused:
            websockets.sync.client.connect(url, additional_headers=headers)
        assert refused.value.response.status_code == 403


def tree(
    server: ServerProcess, token: str, accept: str = "*/*", **options: object
) -> httpx.Response:
    body = {
        "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
        "plan": {"kind": "group", "samples": 2},
        "sampling": {"temperature": 0.0, "max_tokens": 100},
        "reward": {"name": "leaky", "reference": REFERENCE, "options": options},
    }
    return httpx.post(
        f"{server.url}/rollout_tree",
        json=body,
        headers=bearer(token) | {"Accept": accept},
        timeout=60.0,
    )


def test_request_ids_are_each_tokens_own(guarded: ServerProcess) -> None:
    def ask(token: str, prompt: str) -> httpx.Response:
        body = {
            "request_id": "step-1",
            "prompt": prompt,
            "plan": {"kind": "group", "samples": 1},
            "sampling": {"max_tokens": 2},
        }
        url = f"{guarded.url}/rollout_tree"
        return httpx.post(url, json=body, headers=bearer(token), timeout=60.0)

    one, other = ask(ROLLOUT, "Ana"), ask(BOTH, "Tom")
    assert (one.status_code, other.status_code) == (200, 200)
    assert one.json()["nodes"][0] != other.json()["nodes"][0]
    assert ask(ROLLOUT, "Ana").json() == one.json()
    assert ask(ROLLOUT, "Tom").status_code == 409


def test_what_a_reward_function_says_is_for_admin(guarded: ServerProcess) -> None:
    plain, admin = tree(guarded, ROLLOUT), tree(guarded, BOTH)
    errors = [[n["reward_error"] for n in a.json()["nodes"][1:]] for a in (plain, admin)]
    assert errors == [["ValueError"] * 2, [f"ValueError: expected {REFERENCE}"] * 2]
    assert REFERENCE not in plain.text


def test_streams_and_packed_answers_keep_it_too(guarded: ServerProcess) -> None:
    for media in ("application/x-ndjson", "application/msgpack"):
        plain, admin = (tree(guarded, token, accept=media) for token in (ROLLOUT, BOTH))
        assert plain.headers["content-type"].startswith(media)
        assert REFERENCE.encode() not in plain.content
        assert b"ValueError" in plain.content
        assert f"ValueError: expected {REFERENCE}".encode() in admin.content


def test_a_refusal_does_not_quote_the_reference(guarded: ServerProcess) -> None:
    for token in (ROLLOUT, BOTH):
        refused = tree(guarded, token, refuse=True)
        assert refused.status_code == 422
        assert "leaky" in refused.json()["detail"]
        assert REFERENCE not in refused.text


@pytest.mark.parametrize(
    ("reward", "field"),
    [
        ({"name": "gsm8k", "reference": "seventeen"}, "reward.reference"),
        ({"name": "math", "reference": r"\boxed{seventeen or"}, "reward.reference"),
        ({"name": "gsm8k", "reference": ["seventeen"]}, "reward.reference"),
        ({"name": "gsm8k", "reference": "seventeen", "extra": 1}, "reward.extra"),
        ({"name": "gsm9k", "reference": "seventeen"}, "reward.name"),
    ],
)
def test_no_refusal_of_ours_quotes_the_reference(
    guarded: ServerProcess, reward: dict[str, object], field: str
) -> None:
    body = {"prompt": "x", "plan": {"kind": "group", "samples": 1}, "reward": reward}
    answer = httpx.post(
        f"{guarded.url}/rollout_tree", headers=bearer(BOTH), json=body, timeout=60.0
    )
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert "seventeen" not in answer.text


def test_without_details_keeps_everything_else() -> None:
    prompt = Node(id=0, parent=None, depth=0, role=Role.PROMPT)
    leaf = Node(id=1, parent=0, depth=1, reward=0.0, value=0.0, reward_error="KeyError: '72'")
    made = RolloutTree(request_id="x", nodes=[prompt, leaf])
    kept = without_details(made)
    assert kept.nodes[1] == leaf.model_copy(update={"reward_error": "KeyError"})
    assert kept.nodes[0] is prompt
    assert without_details(kept) == kept


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("its process died (SIGKILL)", "its process died (SIGKILL)"),
        ("the engine aborted this response", "the engine aborted this response"),
        ("took longer than its limit of 0.5 s", "took longer than its limit of 0.5 s"),
        ("returned str, not a finite number", "returned str, not a finite number"),
        ("the reward server answered 422: not 72", "the reward server answered 422"),
        ("the reward server gave 72, not a finite number", "the reward function failed"),
        (
            "not sent: for an earlier batch of this tree, the reward server took longer than 60 s",
            "not sent: for an earlier batch of this tree",
        ),
        ("seventeen: expected", "the reward function failed"),
        ("JSONDecodeError: not 72", "JSONDecodeError"),
        ("SystemExit: ", "SystemExit"),
        ("the answer is 72", "the reward function failed"),
        ("took longer than its limit of 5 s, not 72", "took longer than its limit of 5 s"),
    ],
)
def test_only_known_forms_of_reward_errors_pass(error: str, kind: str) -> None:
    assert error_kind(error) == kind


async def test_mounted_applications_are_guarded_and_routes_can_ask_for_scopes() -> None:
    app = create_app(
        Holder(Status(server_id="x")), tokens=load_tokens(None, {"SPOKE_TOKENS": TOKENS})
    )

    async def echo(scope, receive, send) -> None:
        scopes = sorted(granted(Request(scope)))
        await JSONResponse(scopes)(scope, receive, send)

    app.mount("/v1", echo)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        assert (await client.get("/v1/mounted")).status_code == 401
        assert (await client.get("/v1/mounted", headers=bearer(METRICS))).status_code == 403
        found = await client.get("/v1/mounted", headers=bearer(BOTH))
        assert found.json() == ["admin", "rollout"]


async def test_all_scopes_are_granted_where_no_tokens_are_asked_for() -> None:
    app = create_app(Holder(Status(server_id="x")))
    seen = []

    async def keep(scope, receive, send) -> None:
        seen.append(granted(Request(scope)))
        await PlainTextResponse("")(scope, receive, send)

    app.mount("/v1", keep)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        await client.get("/v1/mounted", headers=bearer("whatever"))
    assert seen == [ALL]


SECRET = "s3cret-0123456789"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3cret rollout", ["line 1, token 1", "6 characters", "16", "openssl rand -hex 32"]),
        (f"{SECRET}", ["a scope is missing", "rollout, admin, metrics"]),
        (f"{SECRET} rolout", ["unknown scope 'rolout'", "did you mean rollout?"]),
        (f"{SECRET} rollout,", ["a scope is missing"]),
        (f"{SECRET} rollout,{SECRET}x", ["unknown scope;"]),
        (f"# mine\n{SECRET} rollout\n{SECRET} admin", ["line 3, token 1", "before"]),
        (f"a{SECRET} admin;{SECRET} rollout;{SECRET} admin", ["line 1, token 3", "before"]),
        (f"{SECRET}$ rollout", ["letters, digits"]),
        ("rollout s3cret-0123456789", ["7 characters"]),
    ],
)
def test_tokens_that_cannot_be_used(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    for load in (
        lambda: parse_tokens(text, "SPOKE_TOKENS"),
        lambda: load_tokens(file, {}),
        lambda: load_tokens(None, {"SPOKE_TOKENS": text}),
    ):
        with pytest.raises(ConfigError) as refused:
            load()
        message = str(refused.value)
        assert "s3cret" not in message
        assert "\n" not in message
        for word in words:
            assert word in message


def test_tokens_of_file_and_environment_count_together(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(
        f"# the trainer; not `admin`\n{ROLLOUT}\trollout , metrics  # comment\n\n{ADMIN} admin;\n"
    )
    environment = {"SPOKE_TOKENS": f"{BOTH} rollout,admin"}
    table = load_tokens(file, environment)
    assert table is not None
    assert environment == {}, "no child process gets them"
    assert table.scopes(ROLLOUT.encode()) == {Scope.ROLLOUT, Scope.METRICS}
    assert table.scopes(ADMIN.encode()) == {Scope.ADMIN}
    assert table.scopes(BOTH.encode()) == {Scope.ROLLOUT, Scope.ADMIN}
    assert table.scopes(METRICS.encode()) is None
    assert table.scopes(b"") is None
    assert ROLLOUT not in repr(table)
    with pytest.raises(ConfigError, match="give it once"):
        load_tokens(file, {"SPOKE_TOKENS": f"{ADMIN} rollout"})


def test_files_that_give_no_token(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing yet\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for file, word in (
        (empty, "no token"),
        (binary, "not text"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(ConfigError, match=word) as refused:
            load_tokens(file, {})
        assert str(file) in str(refused.value)
    assert load_tokens(None, {"SPOKE_TOKENS": " # \n"}) is None


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_tokens_are_asked_for_beyond_loopback(host: str, loopback: bool) -> None:
    table = load_tokens(None, {"SPOKE_TOKENS": TOKENS})
    assert is_loopback(host) is loopback
    assert enforced(AuthMode.AUTO, host, table) is table
    assert enforced(AuthMode.ON, host, table) is table
    assert enforced(AuthMode.OFF, host, table) is None
    assert enforced(AuthMode.OFF, host, None) is None
    with pytest.raises(ConfigError, match="--auth on: give tokens"):
        enforced(AuthMode.ON, host, None)
    if loopback:
        assert enforced(AuthMode.AUTO, host, None) is None
    else:
        with pytest.raises(ConfigError, match=f"--host {host} is not loopback: give tokens"):
            enforced(AuthMode.AUTO, host, None)


def test_a_server_beyond_loopback_does_not_start_without_tokens(tiny_math: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPOKE_")}
    done = subprocess.run(
        [sys.executable, "-m", "server", "--model", str(tiny_math), "--host", "0.0.0.0", "--port", "0"],
        capture_output=True, text=True, check=False, env=environment, timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "spoke-server: --host 0.0.0.0 is not loopback: give tokens in SPOKE_TOKENS or --tokens-file, "
        'e.g. SPOKE_TOKENS="$(openssl rand -hex 32) rollout,metrics"; '
        "--auth off only behind something that authenticates"
    )


def test_the_log_warns_of_a_readable_file_and_of_an_open_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKENS)
    table = load_tokens(file, {})
    for mode, said in ((0o644, True), (0o600, False)):
        caplog.clear()
        file.chmod(mode)
        with caplog.at_level(logging.INFO):
            log_auth(AuthMode.AUTO, "0.0.0.0", table, file)
        assert ("chmod 600" in caplog.text) is said
        assert "4 known" in caplog.text
        assert ROLLOUT not in caplog.text
    caplog.clear()
    log_auth(AuthMode.OFF, "0.0.0.0", None, file)
    assert "may use the server" in caplog.text
    assert f"the tokens of {file} are not used" in caplog.text
    assert "SPOKE_TOKENS" not in caplog.text
    caplog.clear()
    log_auth(AuthMode.OFF, "127.0.0.1", None, None, in_environment=True)
    assert "the tokens of SPOKE_TOKENS are not used" in caplog.text
    caplog.clear()
    log_auth(AuthMode.ON, "127.0.0.1", table, None, in_environment=True)
    assert "are not used" not in caplog.text
