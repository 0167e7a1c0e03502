"""Requests made from the served OpenAPI document, sound and broken ones, on a real server that asks for tokens.

1. No 5xx; every answer is one that the document describes: status, media type, headers, schema.
2. Every error is a problem document, and every one that the contract knows has an example in the document.
3. Every example of a request can be sent as it stands, and there is one for each plan and partition.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import ServerProcess, running_server

from shared.wire import Problem, RolloutTreeRequest, RolloutTreeResponse

TOKEN = "schemathesis-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SEED = 4
EXAMPLES = 40
PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def guarded(tiny_math: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on which each request is quick."""
    arguments = ["--engine", "transformers", "--dtype", "float32", "--max-model-len", "64"]
    bounds = ["--max-leaves", "16", "--max-body-mib", "0.1"]
    log = tmp_path_factory.mktemp("guarded") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPOKE_TOKENS", f"{TOKEN} rollout,metrics")
        with running_server(tiny_math, log, *arguments, *bounds) as server:
            yield server


@pytest.fixture(scope="module")
def document(guarded: ServerProcess) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{guarded.url}/openapi.json").json()
    return found


@pytest.mark.slow
def test_requests_made_from_the_document(guarded: ServerProcess, tmp_path: Path) -> None:
    """What it leaves out: whether a request that fits the schema is accepted depends on the server's bounds,
    its model's context and its rewards, of which a schema knows nothing."""
    binary = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert binary is not None, "schemathesis is in the extra `dev`"
    report = tmp_path / "report.ndjson"
    done = subprocess.run(
        [
            binary, "run", f"{guarded.url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}",
            "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES),
            "--seed", str(SEED), "--generation-database", "none", "--no-shrink", "--no-color",
            "--continue-on-failure", "--exclude-checks", "positive_data_acceptance",
            "--report", "ndjson", "--report-ndjson-path", str(report),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert "Traceback" not in guarded.log.read_text()
    assert httpx.get(f"{guarded.url}/livez").status_code == 200
    answers = list(answers_in(report))
    assert len(answers) > 200
    assert {200, 400, 401, 405, 415, 422} <= {status for status, _ in answers}
    for status, media_types in answers:
        assert status < 500
        assert status < 400 or media_types == [PROBLEM], status


def answers_in(report: Path) -> Iterator[tuple[int, list[str]]]:
    """(status, media types) of every answer that schemathesis got, wherever in its events it is."""
    waiting: list[Any] = [json.loads(line) for line in report.read_text().splitlines()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            answer = value.get("response")
            if isinstance(answer, dict) and "status_code" in answer:
                yield answer["status_code"], answer["headers"].get("content-type", [])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def test_every_example_of_a_request_is_served(
    guarded: ServerProcess, document: dict[str, Any]
) -> None:
    content = document["paths"]["/rollout_tree"]["post"]["requestBody"]["content"]
    examples = {name: e["value"] for name, e in content["application/json"]["examples"].items()}
    requests = [RolloutTreeRequest.model_validate(value) for value in examples.values()]
    kinds = {request.plan.kind for request in requests}
    partitions = {r.plan.partition.kind for r in requests if r.plan.kind == "chain"}
    assert kinds == {"tree", "chain", "group"}
    assert partitions == {"cutpoints", "fixed", "delimiter", "whole"}
    for name, value in examples.items():
        answer = httpx.post(f"{guarded.url}/rollout_tree", json=value, headers=BEARER, timeout=60.0)
        assert answer.status_code == 200, (name, answer.text)
        assert RolloutTreeResponse.model_validate_json(answer.content).usage.sampled_tokens > 0


def test_every_error_is_described_with_an_example(document: dict[str, Any]) -> None:
    described = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if int(status) < 400 or path.startswith("/v1/"):
                    continue
                assert list(answer["content"]) == [PROBLEM], (path, status)
                example = Problem.model_validate(answer["content"][PROBLEM]["example"])
                assert example.status == int(status)
                described.add(int(status))
    assert described >= {400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429, 503}
    rollout = document["paths"]["/rollout_tree"]["post"]["responses"]
    assert "WWW-Authenticate" in rollout["401"]["headers"]
    assert "Retry-After" in rollout["503"]["headers"]
    assert "ValidationError" not in json.dumps(document)


def test_the_document_says_which_paths_need_a_token(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    paths = document["paths"]
    assert paths["/rollout_tree"]["post"]["security"] == [{"bearer": []}]
    assert paths["/info"]["get"]["security"] == [{"bearer": []}]
    for path in ("/livez", "/readyz"):
        assert paths[path]["get"]["security"] == []
        assert "401" not in paths[path]["get"]["responses"]
