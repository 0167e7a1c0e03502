"""What an answer weighs in each form, and what it costs to make and to read.

A 6-6-6 tree with 600-token segments (259 nodes, 154,860 tokens, with text) as JSON, as msgpack and as a stream of
lines (`shared/stream.py`), plain and with zstd around it, on one thread; a stream's lines can be read one by one.
Three trees, since bytes depend on what is in them:

- `tiny_math`: tokens, texts and logprobs as that model's engine sampled them in float32 (16 responses each to a
  few hundred questions, one after another, since none is 600 tokens long);
- `large vocabulary`: GSM8K's solutions in a byte-pair encoding made from them, its ids spread over 151,000, and
  float32 log-softmax of made-up logits: three tokens in four nearly certain, the others anything. The solutions
  are of different questions; those of a real tree have more in common;
- `independent ids`: the same texts, but token ids that know nothing of each other (Zipf's law over 151,000) and
  logprobs that are noise to the last of float32's bits: the worst case.

"no zstd" is the packed form with its arrays as they are before compression.

    python tests/benchmarks/codec.py [--repeats 15]
"""

import argparse
import asyncio
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

import msgpack  # noqa: E402 - after the path
import numpy as np  # noqa: E402 - after the path
import zstandard  # noqa: E402 - after the path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from server.answer import wire_nodes  # noqa: E402 - after the path
from server.continuations import Continuations  # noqa: E402 - after the path
from server.engines.settings import EngineSettings  # noqa: E402 - after the path
from server.sampler import sample  # noqa: E402 - after the path
from server.tokens import Tokens  # noqa: E402 - after the path
from shared.codec import MediaType, compress, decode, decompress, encode  # noqa: E402
from shared.stream import Assembler, lines  # noqa: E402 - after the path
from shared.tree import FinishReason, Node, Role  # noqa: E402 - after the path
from shared.wire import (  # noqa: E402 - after the path
    GroupPlan,
    RolloutTreeResponse,
    Sampling,
    Timing,
    Usage,
    WeightVersions,
)
from shared.zstd import LEVEL, content_size  # noqa: E402 - after the path

MATERIAL = ROOT.parent / "shared"
FACTOR, DEPTH, SEGMENT, PROMPT = 6, 3, 600, 60
TOKENS = PROMPT + SEGMENT * sum(FACTOR**depth for depth in range(1, DEPTH + 1))
VOCABULARY = 151_000
STORY = (
    "Ana has {} apples. She buys {} more. She finds {} more. She loses {}. "
    "How many apples does Ana have now?\n"
)
Text = Callable[[Sequence[int]], str]


def grown(token_ids: Sequence[int], logprobs: Sequence[float], text: Text) -> RolloutTreeResponse:
    """The tree whose nodes take these tokens one segment after another."""
    prompt = list(token_ids[:PROMPT])
    nodes = [
        Node(id=0, parent=None, depth=0, role=Role.PROMPT, token_ids=prompt, text=text(prompt))
    ]

    def grow(parent: int, depth: int) -> None:
        for _ in range(FACTOR):
            start = PROMPT + (len(nodes) - 1) * SEGMENT
            ids = list(token_ids[start : start + SEGMENT])
            leaf = depth == DEPTH
            nodes.append(
                Node(
                    id=len(nodes), parent=parent, depth=depth, token_ids=ids,
                    logprobs=list(logprobs[start : start + SEGMENT]), versions=[(3, SEGMENT)],
                    finish_reason=FinishReason.STOP if leaf else FinishReason.LENGTH,
                    text=text(ids), reward=float(len(nodes) % 3 == 0) if leaf else None,
                )
            )  # fmt: skip
            if not leaf:
                grow(len(nodes) - 1, depth + 1)

    grow(0, 1)
    usage = Usage(
        prompt_tokens=PROMPT, sampled_tokens=TOKENS - PROMPT,
        computed_prefill_tokens=PROMPT, cached_tokens=9000,
    )  # fmt: skip
    return RolloutTreeResponse(
        request_id="tree-0123456789abcdef", nodes=nodes, server_id="host-1", model="model",
        usage=usage, weight_versions=WeightVersions(min=3, max=3),
        timing=Timing(queue_s=0.0012, sample_s=31.4159, reward_s=0.27),
    ).with_values()  # fmt: skip


async def sampled_tree() -> RolloutTreeResponse:
    """Of what tiny_math samples."""
    model = str(MATERIAL / "models/tiny_math")
    module = importlib.import_module("server.engines.transformers")
    engine = await module.open_engine(EngineSettings(model=model, dtype="float32"))
    tokens = Tokens.load(model)
    ids: list[int] = []
    logprobs: list[float] = []

    async def answer(seed: int) -> list[Node]:
        story = STORY.format(10 + seed % 37, 3 + seed % 11, 2 + seed % 7, 1 + seed % 5)
        prompt = tokens.encode(story)
        asked = Continuations(
            engine=engine, tokens=tokens, prompt=tuple(prompt),
            sampling=Sampling(max_tokens=200), seed=seed,
        )  # fmt: skip
        return wire_nodes(await sample(GroupPlan(samples=16), asked), prompt, {}, None)[1:]

    seed = 0
    while len(ids) < TOKENS:
        for nodes in await asyncio.gather(*(answer(s) for s in range(seed, seed + 16))):
            ids += [token for node in nodes for token in node.token_ids]
            logprobs += [value for node in nodes for value in node.logprobs or []]
        seed += 16
    await engine.close()
    return grown(ids, logprobs, tokens.decode)


def made_up_trees() -> dict[str, RolloutTreeResponse]:
    """GSM8K's solutions in a large vocabulary, with two kinds of logprobs."""
    lines = (MATERIAL / "data/gsm8k/train.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] + "\n" for line in lines]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=20_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(solutions, trainer)
    spread = VOCABULARY // tokenizer.get_vocab_size()
    flat = (token for text in solutions for token in tokenizer.encode(text).ids)
    ids = [token * spread for token in islice(flat, TOKENS)]
    text = lambda some: tokenizer.decode([token // spread for token in some])  # noqa: E731
    generator = np.random.default_rng(0)
    noise = np.log(np.clip(generator.beta(5, 0.4, TOKENS), 1e-9, 1.0)).astype(np.float32)
    softmax = np.concatenate([_log_softmax(generator, 2000) for _ in range(TOKENS // 2000 + 1)])
    return {
        "large vocabulary": grown(ids, softmax.tolist(), text),
        "independent ids": _with_ids(grown(ids, noise.tolist(), text), generator),
    }


def _with_ids(tree: RolloutTreeResponse, generator: np.random.Generator) -> RolloutTreeResponse:
    """The same tree with other token ids: independent ones."""
    ranks = generator.zipf(1.15, 4 * TOKENS)
    ids = iter(generator.permutation(VOCABULARY)[ranks[ranks < VOCABULARY]].tolist())
    nodes = [
        n.model_copy(update={"token_ids": list(islice(ids, len(n.token_ids)))}) for n in tree.nodes
    ]
    return tree.model_copy(update={"nodes": nodes})


def _log_softmax(generator: np.random.Generator, count: int) -> np.ndarray:
    """[count] float32 logprobs, computed as engines do, of tokens drawn from made-up distributions."""
    logits = (generator.standard_normal((count, 1000)) * 2.5).astype(np.float32)
    sure = generator.random(count) < 0.75
    gap = np.where(sure, generator.normal(8, 3, count), generator.normal(1, 1.5, count))
    logits[:, 0] = np.log(np.exp(logits.astype(np.float64)).sum(1)) + gap
    drawn = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    shifted = logits - logits.max(1, keepdims=True)
    total = np.exp(shifted).sum(1, dtype=np.float32)
    return np.asarray(shifted[np.arange(count), drawn] - np.log(total))


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """(what it gives, median milliseconds)."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        took.append(time.perf_counter() - began)
    return result, statistics.median(took) * 1e3


def uncompressed(body: bytes) -> int:
    """Bytes of a msgpack body if its arrays and texts were not compressed."""
    nodes = msgpack.unpackb(body)["nodes"]
    frames = (nodes["token_ids"]["data"], nodes["logprobs"]["data"], nodes["text"])
    return len(body) + sum((content_size(frame) or 0) - len(frame) for frame in frames)


def stream_of(tree: RolloutTreeResponse, zstd: bool) -> list[bytes]:
    """Its lines, as the server sends them."""
    pieces = [line.encode() for line in lines(tree)]
    if not zstd:
        return pieces
    frame, flush = (
        zstandard.ZstdCompressor(level=LEVEL).compressobj(),
        zstandard.COMPRESSOBJ_FLUSH_BLOCK,
    )
    return [frame.compress(piece) + frame.flush(flush) for piece in pieces] + [frame.flush()]


def read_stream(pieces: Sequence[bytes], zstd: bool) -> RolloutTreeResponse:
    """The tree of its lines."""
    frame, made = zstandard.ZstdDecompressor().decompressobj(), Assembler()
    found: Any = None
    for piece in pieces:
        if line := frame.decompress(piece) if zstd else piece:  # the last piece of a frame has none
            found = made.feed(line)
    assert isinstance(found, RolloutTreeResponse)
    return found


def row(name: str, label: str, size: int, share: float, took: Sequence[float]) -> dict[str, Any]:
    """One form of one tree."""
    encode_ms, decode_ms = (round(ms, 1) for ms in took)
    print(
        f"{name:<24} {label:<27} {size:9,d} {share:6.1%} {encode_ms:7.1f} {decode_ms:7.1f}",
        flush=True,
    )
    return {"tree": name, "form": label, "bytes": size, "of_json": round(share, 4),
            "encode_ms": encode_ms, "decode_ms": decode_ms}  # fmt: skip


def measure_streams(name: str, tree: RolloutTreeResponse, repeats: int) -> list[dict[str, Any]]:
    """A row for each form of a stream."""
    json_bytes, rows = len(encode(tree, MediaType.JSON)), []
    for zstd in (False, True):
        pieces, encode_ms = timed(partial(stream_of, tree, zstd), repeats)
        read, decode_ms = timed(partial(read_stream, pieces, zstd), repeats)
        assert read == tree, "what comes out is what went in"
        size = sum(map(len, pieces))
        label = f"{MediaType.NDJSON}{' + zstd' if zstd else ''}"
        rows.append(row(name, label, size, size / json_bytes, (encode_ms, decode_ms)))
    return rows


def measure(name: str, tree: RolloutTreeResponse, repeats: int) -> list[dict[str, Any]]:
    """A row for each form."""
    rows: list[dict[str, Any]] = []
    json_bytes = len(encode(tree, MediaType.JSON))
    for media in (MediaType.JSON, MediaType.MSGPACK):
        for zstd in (False, True):
            pack = lambda m=media, z=zstd: compress(encode(tree, m)) if z else encode(tree, m)  # noqa: E731
            body, encode_ms = timed(pack, repeats)
            unpack = lambda b=body, m=media, z=zstd: decode(decompress(b, 1 << 27) if z else b, m)  # noqa: E731
            decoded, decode_ms = timed(unpack, repeats)
            assert decoded == tree, "what comes out is what went in"
            share = len(body) / json_bytes
            label = f"{media}{' + zstd' if zstd else ''}"
            raw = uncompressed(body) if media is MediaType.MSGPACK and not zstd else None
            rows.append(
                {"tree": name, "form": label, "bytes": len(body), "of_json": round(share, 4),
                 "uncompressed": raw,
                 "encode_ms": round(encode_ms, 1), "decode_ms": round(decode_ms, 1)}
            )  # fmt: skip
            print(
                f"{name:<24} {label:<27} {len(body):9,d} {share:6.1%} {encode_ms:7.1f} {decode_ms:7.1f}"
                + (f"   (no zstd: {raw:,d}, {raw / json_bytes:.1%})" if raw else ""),
                flush=True,
            )
    return rows + measure_streams(name, tree, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    trees = {"tiny_math": asyncio.run(sampled_tree()), **made_up_trees()}
    print(f"{'tree':<24} {'form':<27} {'bytes':>9} {'JSON':>6} {'enc ms':>7} {'dec ms':>7}")
    rows = [row for name, tree in trees.items() for row in measure(name, tree, repeats)]
    print(json.dumps({"tokens": TOKENS, "repeats": repeats, "rows": rows}))


if __name__ == "__main__":
    main()
