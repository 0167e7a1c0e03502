"""`GET /weights/…`: what a server holds, for its peers; who may ask, for how many files at once.

1. Held files of the run's manifests and the manifests themselves, whole or from a byte on; nothing else.
2. The store's token reads weights and does nothing else; a rollout token reads none.
3. Beyond the bound the answer is 429 with Retry-After, and the places come back.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support import on_a_socket
from versions import RUN, Versions

from server.app import Holder, create_app
from server.auth import Scope, TokenTable, load_tokens, with_store_token
from server.holdings import Holdings
from server.status import Status
from server.weights_routes import UPLOADS
from shared.store import MANIFEST

STORE = "store-0123456789abcdef"
ROLLOUT = "rollout-0123456789abcdef"
SHARD = "weights-0.safetensors"
SIZE = 24 << 20
"""Of a shard: more than a connection's buffers hold."""


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    made = Versions(tmp_path, shards=(SIZE,))
    made.publish()
    made.publish()
    return made


@pytest.fixture
async def url(versions: Versions, tmp_path: Path) -> AsyncIterator[str]:
    """Of a server that holds version 0, and of version 1 files that it has not added."""
    holdings = Holdings(tmp_path / "held", RUN)
    for manifest in versions.manifests:
        versions.store.fetch(manifest, holdings.incoming(manifest))
    holdings.add(versions.manifests[0], versions.manifests[0].files)
    holder = Holder(Status(server_id="s"))
    holder.holdings = holdings
    tokens = with_store_token(
        load_tokens(None, {"SPOKE_TOKENS": f"{ROLLOUT} rollout,metrics"}), STORE
    )
    async with on_a_socket(create_app(holder, tokens=tokens)) as port:
        yield f"http://127.0.0.1:{port}"
    holdings.close()


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {STORE}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=20
    ) as opened:
        yield opened


async def test_held_files_are_sent(client: httpx.AsyncClient, versions: Versions) -> None:
    data = (versions.folder(0) / SHARD).read_bytes()
    whole = await client.get(f"/weights/{RUN}/v000000/{SHARD}")
    assert (whole.status_code, whole.content == data) == (200, True)
    assert whole.headers["content-type"] == "application/octet-stream"
    manifest = await client.get(f"/weights/{RUN}/v000000/{MANIFEST}")
    assert manifest.content == versions.manifests[0].encode()
    metrics = {"Authorization": f"Bearer {ROLLOUT}"}
    said = (await client.get("/metrics", headers=metrics)).text
    sent = next(
        line for line in said.splitlines() if line.startswith("spoke_weight_sent_bytes_total")
    )
    assert float(sent.split()[1]) == SIZE + len(manifest.content)


@pytest.mark.parametrize(
    ("asked", "status", "start"),
    [
        (f"bytes={SIZE - 10}-", 206, SIZE - 10),
        ("bytes=5-9", 206, 5),
        (f"bytes={SIZE}-", 416, 0),
        ("bytes=9-5", 200, 0),
        ("bytes=-5", 200, 0),
        ("bytes=0-1,5-6", 200, 0),
        ("lines=1-2", 200, 0),
        ("bytes=99999999999999999999-", 200, 0),
    ],
)
async def test_ranges(
    client: httpx.AsyncClient, versions: Versions, asked: str, status: int, start: int
) -> None:
    data = (versions.folder(0) / SHARD).read_bytes()
    answer = await client.get(f"/weights/{RUN}/v000000/{SHARD}", headers={"Range": asked})
    assert answer.status_code == status
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
        assert answer.json()["field"] == "range"
    else:
        assert answer.content == data[start : start + len(answer.content)]
        assert len(answer.content) == {0: SIZE, 5: 5}.get(start, 10)


@pytest.mark.parametrize(
    "path",
    [
        f"{RUN}/v000001/delta-0.zst",  # on the disk, not added
        f"{RUN}/v000001/{MANIFEST}",
        f"{RUN}/v000000/nothing",
        f"{RUN}/v000000/.lock",
        f"{RUN}/v000000/..%2F.lock",
        f"{RUN}/v0/{SHARD}",
        f"other/v000000/{SHARD}",
    ],
)
async def test_nothing_else_is_sent(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"/weights/{path}")
    assert answer.status_code in (403, 404)  # an encoded slash makes it a path of another scope
    assert answer.headers["content-type"] == "application/problem+json"


async def test_who_may_read_weights(client: httpx.AsyncClient, url: str) -> None:
    path = f"/weights/{RUN}/v000000/{MANIFEST}"
    other = await client.get(path, headers={"Authorization": f"Bearer {ROLLOUT}"})
    assert (other.status_code, "weights" in other.json()["detail"]) == (403, True)
    async with httpx.AsyncClient(base_url=url) as stranger:
        assert (await stranger.get(path)).status_code == 401
    for elsewhere in ("/info", "/metrics", "/v1/models", "/weights/live", "/nothing"):
        assert (await client.get(elsewhere)).status_code == 403


def test_the_stores_token_adds_to_what_the_same_token_may_already() -> None:
    assert with_store_token(None, STORE) is None  # it alone asks nobody for tokens
    tokens = with_store_token(load_tokens(None, {"SPOKE_TOKENS": f"{STORE} rollout"}), STORE)
    assert isinstance(tokens, TokenTable)
    assert tokens.scopes(STORE.encode()) == {Scope.ROLLOUT, Scope.WEIGHTS}
    plain = load_tokens(None, {"SPOKE_TOKENS": f"{STORE} weights"})
    assert with_store_token(plain, None) is plain


async def test_so_many_at_once(client: httpx.AsyncClient) -> None:
    path = f"/weights/{RUN}/v000000/{SHARD}"
    begun = [
        await client.send(client.build_request("GET", path), stream=True) for _ in range(UPLOADS)
    ]
    assert {answer.status_code for answer in begun} == {200}
    busy = await client.get(path)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "2")
    for answer in begun:
        await answer.aclose()
    async with asyncio.timeout(20):
        while (await client.get(path, headers={"Range": "bytes=0-9"})).status_code == 429:
            await asyncio.sleep(0.02)


async def test_a_server_that_follows_no_run_holds_nothing() -> None:
    async with (
        on_a_socket(create_app(Holder(Status(server_id="s")))) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        answer = await client.get(f"/weights/{RUN}/v000000/{MANIFEST}")
        assert (answer.status_code, "does not hold" in answer.json()["detail"]) == (404, True)
