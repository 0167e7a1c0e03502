"""`spoke push`: a new checkpoint reaches a running server whole, exactly, and between two tokens.

1. Afterwards greedy tokens and logprobs are those of the new checkpoint under a plain forward pass.
2. With requests running before, during and after, every token's logprob is that of the version its span names,
   computed with that version's weights over the whole prefix: no token mixes weights.
3. Trees that are to begin anew at a swap are of one version each, and their streams say so.
4. A checkpoint that does not fit is not pushed. Forced, it is refused by the server: the old weights serve on, the
   fleet table says why, and the next version that fits is taken.
"""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.coordination import RedisCoordinator
from shared.stream import Assembler, RestartLine
from shared.wire import RolloutTreeResponse

PROMPTS = [
    "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "Tom has 30 coins. He gives away 8. How many coins does Tom have now?\n",
]


def changed(model: Path, folder: Path, scale: float, seed: int) -> Path:
    """A copy of a checkpoint with every tensor disturbed."""
    shutil.copytree(model, folder)
    torch.manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    noisy = {name: t + scale * t.std() * torch.randn_like(t) for name, t in tensors.items()}
    (folder / "model.safetensors").unlink()  # the copy is as read-only as the original
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def push(
    following: Any, model: Path, *options: str, wait: float = 60.0
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "trainer.cli", "push", str(model), "--redis-url", following.redis_url,
        "--run", following.run, "--store", following.store, "--wait", str(wait),
        *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class Reference:
    """Plain transformers forward passes of each version."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}

    def add(self, version: int, path: Path) -> None:
        self.models[version] = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def logprobs(self, version: int, ids: list[int]) -> torch.Tensor:
        """[L - 1, V] log-probabilities of what follows each token."""
        return self.models[version](torch.tensor([ids])).logits[0, :-1].log_softmax(-1)

    def check(self, tree: RolloutTreeResponse) -> set[int]:
        """Every token of every path against its span's version; returns the versions seen."""
        seen: set[int] = set()
        for leaf in tree.leaves():
            path = tree.path(leaf.id)
            ids = tree.prompt_token_ids + tree.response_token_ids(leaf.id)
            claimed = [lp for node in path for lp in node.logprobs]
            versions = [v for node in path for v, count in node.versions for _ in range(count)]
            begin = len(tree.prompt_token_ids)
            for version in set(versions):
                full = self.logprobs(version, ids)
                own = full[range(begin - 1, len(ids) - 1), ids[begin:]]
                for mine, theirs, v in zip(own.tolist(), claimed, versions, strict=True):
                    assert v != version or abs(mine - theirs) < 1e-3, (version, mine, theirs)
            seen |= set(versions)
        return seen


async def ask(
    client: httpx.AsyncClient, prompt: str, *, samples: int = 4, **sampling: Any
) -> RolloutTreeResponse:
    body = {
        "prompt": prompt,
        "plan": {"kind": "group", "samples": samples},
        "sampling": {"max_tokens": 120} | sampling,
    }
    answer = await client.post("/rollout_tree", json=body)
    assert answer.status_code == 200, answer.text
    return RolloutTreeResponse.model_validate_json(answer.content)


async def version_of(client: httpx.AsyncClient) -> int:
    return int((await client.get("/info")).json()["weights"]["version"])


@pytest.mark.slow
async def test_a_pushed_version_is_exact_before_during_and_after(
    following: Any, tiny_math: Path, tmp_path: Path
) -> None:
    reference = Reference()
    tokenizer = AutoTokenizer.from_pretrained(tiny_math)
    async with httpx.AsyncClient(base_url=following.url, timeout=120.0) as client:
        done = await asyncio.to_thread(push, following, tiny_math)
        assert done.returncode == 0, done.stderr
        first = await version_of(client)
        reference.add(first, tiny_math)
        newer = changed(tiny_math, tmp_path / "newer", 0.03, seed=1)
        reference.add(first + 1, newer)

        before = [await ask(client, prompt) for prompt in PROMPTS]
        assert {v for tree in before for v in reference.check(tree)} == {first}

        pushing = asyncio.create_task(asyncio.to_thread(push, following, newer))
        during: list[RolloutTreeResponse] = []
        while not pushing.done():
            during += await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS * 4))
        assert (await pushing).returncode == 0, (await pushing).stderr
        assert {v for tree in during for v in reference.check(tree)} <= {first, first + 1}

        for prompt in PROMPTS:
            after = await ask(client, prompt, temperature=0.0)
            assert reference.check(after) == {first + 1}
            leaf = after.nodes[1]
            ids = tokenizer(prompt)["input_ids"] + leaf.token_ids
            greedy = reference.logprobs(first + 1, ids).argmax(-1).tolist()
            assert greedy[-len(leaf.token_ids) :] == leaf.token_ids


@pytest.mark.slow
async def test_a_swap_in_the_middle_of_a_response_is_exact(
    following: Any, tiny_math: Path, tmp_path: Path
) -> None:
    """Long responses are under way when the swap comes; their spans name both versions and both are right."""
    reference = Reference()
    async with httpx.AsyncClient(base_url=following.url, timeout=120.0) as client:
        assert (await asyncio.to_thread(push, following, tiny_math)).returncode == 0
        first = await version_of(client)
        reference.add(first, tiny_math)
        newer = changed(tiny_math, tmp_path / "newer", 0.02, seed=2)
        reference.add(first + 1, newer)

        stop = asyncio.Event()

        async def keep_asking() -> list[RolloutTreeResponse]:
            trees = []
            while not stop.is_set():
                # Many, so that some response is under way at any moment.
                trees.append(await ask(client, PROMPTS[0], temperature=1.0, samples=32))
            return trees

        asking = [asyncio.create_task(keep_asking()) for _ in range(6)]
        done = await asyncio.to_thread(push, following, newer)
        stop.set()
        assert done.returncode == 0, done.stderr
        trees = [tree for batch in await asyncio.gather(*asking) for tree in batch]
        mixed = [t for t in trees if t.weight_versions.min != t.weight_versions.max]
        assert mixed, "no response was under way at the swap"
        for tree in mixed:
            assert reference.check(tree) == {first, first + 1}
            for node in tree.nodes[1:]:
                assert [v for v, _ in node.versions] == sorted({v for v, _ in node.versions})


@pytest.mark.slow
async def test_trees_that_begin_anew_at_a_swap_are_of_one_version(
    following: Any, tiny_math: Path, tmp_path: Path
) -> None:
    reference = Reference()
    body = {
        "prompt": PROMPTS[0],
        "plan": {"kind": "tree", "branch_factors": [8, 4], "segment_tokens": 16},
        "sampling": {"max_tokens": 120},
        "in_flight": "restart",
    }
    async with httpx.AsyncClient(base_url=following.url, timeout=120.0) as client:
        assert (await asyncio.to_thread(push, following, tiny_math)).returncode == 0
        first = await version_of(client)
        reference.add(first, tiny_math)
        newer = changed(tiny_math, tmp_path / "newer", 0.02, seed=2)
        reference.add(first + 1, newer)
        stop = asyncio.Event()

        async def keep_asking() -> list[tuple[RolloutTreeResponse, list[int]]]:
            """Trees, and the versions with which they were begun anew."""
            trees = []
            while not stop.is_set():
                answer = await client.post(
                    "/rollout_tree", json=body, headers={"Accept": "application/x-ndjson"}
                )
                assembler, anew = Assembler(), []
                for line in answer.text.splitlines():
                    found = assembler.feed(line)
                    if isinstance(found, RestartLine):
                        anew.append(found.version)
                assert isinstance(found, RolloutTreeResponse)
                trees.append((found, anew))
            return trees

        asking = [asyncio.create_task(keep_asking()) for _ in range(6)]
        done = await asyncio.to_thread(push, following, newer)
        stop.set()
        assert done.returncode == 0, done.stderr
        trees = [pair for batch in await asyncio.gather(*asking) for pair in batch]
        restarted = [tree for tree, anew in trees if anew]
        assert restarted, "no tree grew at the swap"
        assert all(anew in ([], [first + 1]) for _, anew in trees)
        assert all(tree.weight_versions.min == tree.weight_versions.max for tree, _ in trees)
        assert {v for tree in restarted for v in reference.check(tree)} == {first + 1}


@pytest.mark.slow
async def test_a_checkpoint_that_does_not_fit_changes_nothing(
    following: Any, tiny_math: Path, tmp_path: Path
) -> None:
    assert (await asyncio.to_thread(push, following, tiny_math)).returncode == 0
    async with httpx.AsyncClient(base_url=following.url, timeout=120.0) as client:
        before = await version_of(client)
        greedy = await ask(client, PROMPTS[0], temperature=0.0)
        wider = tmp_path / "wider"
        shutil.copytree(tiny_math, wider)
        config = json.loads((wider / "config.json").read_text()) | {"intermediate_size": 64}
        (wider / "config.json").unlink()
        (wider / "config.json").write_text(json.dumps(config))
        (wider / "model.safetensors").unlink()
        AutoModelForCausalLM.from_config(
            type(AutoModelForCausalLM.from_pretrained(tiny_math).config)(**config)
        ).save_pretrained(wider)
        done = await asyncio.to_thread(push, following, wider)
        assert done.returncode == 2, done.stdout
        assert "give another --run, or --force" in done.stderr
        done = await asyncio.to_thread(push, following, wider, "--force", wait=3.0)
        assert done.returncode == 1, done.stdout
        coordinator = RedisCoordinator(following.redis_url, following.run)
        for _ in range(300):
            record = next(r for r in await coordinator.servers() if r.url == following.url)
            if record.last_error:
                break
            await asyncio.sleep(0.1)
        await coordinator.close()
        assert f"version {before + 1}" in (record.last_error or "")
        assert await version_of(client) == before
        again = await ask(client, PROMPTS[0], temperature=0.0)
        assert [n.token_ids for n in again.nodes] == [n.token_ids for n in greedy.nodes]
        assert (await asyncio.to_thread(push, following, tiny_math, "--force")).returncode == 0
        assert await version_of(client) == before + 2
