"""A process of its own that checks every tree of a load test, behind everybody else in line for the CPU.

It gets whole bodies as they came over the wire, and answers at the end with what it found.
"""

import json
import multiprocessing as mp
import os
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty, Full
from typing import Any

TWINS_KEPT = 256
"""Trees by request id whose second copy has not come yet; the oldest are given up."""
FILES = 20
"""Most trees that are written out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, as it came."""

    number: int
    body: dict[str, Any]
    """The request's."""
    media: str
    encoding: str
    """`zstd` or empty."""
    content: bytes


@dataclass(frozen=True, slots=True)
class Setup:
    """What the checker needs to know."""

    model: Path
    context: int
    ends: frozenset[int]
    share: float
    """Of the trees, compared with a plain forward pass."""
    out: Path
    """Folder for wrong trees."""
    seed: int


@dataclass(slots=True)
class Findings:
    """What came of it."""

    trees: int = 0
    nodes: int = 0
    tokens: int = 0
    compared: int = 0
    """By a plain forward pass."""
    twins: int = 0
    """Pairs of answers to one request id that were compared."""
    faults: list[str] = field(default_factory=list)
    """With the file of the tree."""
    wrong: int = 0
    """Trees with a fault."""
    cpu_s: float = 0.0


class Checker:
    """The process, from outside. Close it, whatever happens.

    Args:
        setup: of the process.
        most: answers in line; whoever brings more waits.
    """

    def __init__(self, setup: Setup, most: int = 400) -> None:
        context = mp.get_context("spawn")
        self._answers: Queue[Answer | None] = context.Queue(most)
        self._findings: Queue[Findings] = context.Queue()
        self._process = context.Process(
            target=_main, args=(setup, self._answers, self._findings), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def put(self, answer: Answer) -> None:
        """Hand over an answer; blocks while the line is full."""
        while self._process.is_alive():
            try:
                return self._answers.put(answer, timeout=1)
            except Full:
                continue
        raise RuntimeError("the checker died")

    def finish(self, timeout_s: float) -> Findings:
        """What it found in all that was put.

        Raises:
            queue.Empty: it did not come to the end in time, or died.
        """
        self._answers.put(None)
        return self._findings.get(timeout=timeout_s)

    def close(self) -> None:
        """End the process."""
        self._answers.cancel_join_thread()
        self._process.kill()
        self._process.join()


def _main(setup: Setup, answers: "Queue[Answer | None]", findings: "Queue[Findings]") -> None:
    os.nice(19)
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = mp.parent_process()
    assert parent is not None
    check = _Check(setup)
    while parent.is_alive():
        try:
            answer = answers.get(timeout=2)
        except Empty:
            continue
        if answer is None:
            check.findings.cpu_s = time.process_time()
            findings.put(check.findings)
            return
        check.take(answer)


class _Check:
    def __init__(self, setup: Setup) -> None:
        from transformers import AutoTokenizer

        from tests.benchmarks.load_parts.plain_model import PlainModel
        from tests.benchmarks.load_parts.tree_checks import Truth

        tokenizer = AutoTokenizer.from_pretrained(setup.model)
        self._truth = Truth(
            encode=lambda text: list(tokenizer(text)["input_ids"]),
            decode=lambda ids: tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            ends=setup.ends,
            context=setup.context,
        )
        self._plain = PlainModel(setup.model)
        self._setup = setup
        self._random = random.Random(setup.seed)
        self._twins: OrderedDict[str, str] = OrderedDict()
        self.findings = Findings()

    def take(self, answer: Answer) -> None:
        """Check one answer."""
        try:
            found = self._faults(answer)
        except (
            Exception
        ) as error:  # whatever a wrong tree makes of the checks is a fault of the tree
            found = [f"{type(error).__name__}: {error}"]
        if found:
            self.findings.wrong += 1
            self._write(answer, found)

    def _faults(self, answer: Answer) -> list[str]:
        from shared.wire import RolloutTreeRequest
        from tests.benchmarks.load_parts.tree_checks import faults

        tree, findings = tree_of_answer(answer), self.findings
        request = RolloutTreeRequest.model_validate(answer.body)
        findings.trees += 1
        findings.nodes += len(tree.nodes) - 1
        findings.tokens += tree.usage.sampled_tokens
        found = faults(request, tree, self._truth)
        if not found and self._random.random() < self._setup.share:
            findings.compared += 1
            found = self._plain.faults(request, tree)
        if request.request_id is not None:
            found += self._twin(request.request_id, tree.model_dump_json(include={"nodes"}))
        return found

    def _twin(self, request_id: str, nodes: str) -> list[str]:
        first = self._twins.pop(request_id, None)
        if first is None:
            self._twins[request_id] = nodes
            if len(self._twins) > TWINS_KEPT:
                self._twins.popitem(last=False)
            return []
        self.findings.twins += 1
        return [] if first == nodes else [f"request_id {request_id}: two different trees"]

    def _write(self, answer: Answer, found: list[str]) -> None:
        faults = self.findings.faults
        if len(faults) >= FILES:
            return
        path = self._setup.out / f"wrong-{answer.number}.json"
        text = answer.content.decode("utf-8", "replace")
        if not answer.encoding and answer.media != "application/msgpack":
            document: Any = text
        else:
            path.with_suffix(".bin").write_bytes(answer.content)
            document = path.with_suffix(".bin").name
        about = {"faults": found, "request": answer.body, "media": answer.media}
        path.write_text(json.dumps(about | {"encoding": answer.encoding, "answer": document}))
        faults.append(
            f"{path}: {found[0]}" + (f" (and {len(found) - 1} more)" if found[1:] else "")
        )


def tree_of_answer(answer: Answer) -> Any:
    """The tree of a body, in any of the three forms."""
    from shared.codec import LIMIT_BYTES, MediaType, decode, decompress
    from shared.stream import Assembler

    content = answer.content
    if answer.encoding == "zstd":
        content = decompress(content, LIMIT_BYTES)
    if answer.media != MediaType.NDJSON:
        return decode(content, MediaType(answer.media))
    lines = Assembler()
    for line in content.splitlines():
        last = lines.feed(line)
    if not lines.ended:
        raise ValueError("the stream ends before its last line")
    return last
