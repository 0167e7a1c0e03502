"""Replay of a tree's segments over several iterations (DESIGN section 4).

A tree of 6-6-6 gives up to 258 segments. An iteration trains at most `per_question` of a question; the rest wait,
with the behaviour logprobs and versions that they were sampled with, until they are taken or too old.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.tree import RolloutTree
from trainer.algorithms.base import Segment


@dataclass(slots=True, kw_only=True)
class Waiting:
    """Segments of one tree that have not trained yet."""

    tree: RolloutTree
    born: int
    """Iteration that sampled it."""
    advantages: dict[int, float]
    """By node id."""


def question_of(tree: RolloutTree) -> str:
    """Which question a tree answers: the last part of its request id; see `requests.tree_request`."""
    return tree.request_id.rpartition("/")[2]


@dataclass(slots=True, kw_only=True)
class Replay:
    """Segments that wait for their iteration.

    Args:
        per_question: most segments of a question in one iteration.
        max_age: iterations that a segment may wait; a segment of age `max_age` may still be taken.
        seed: of the choice.

    >>> tree = RolloutTree.model_validate({"request_id": "q", "nodes": [
    ...     {"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [5]},
    ...     {"id": 1, "parent": 0, "depth": 1, "token_ids": [7], "logprobs": [-1.0], "reward": 1.0},
    ...     {"id": 2, "parent": 0, "depth": 1, "token_ids": [8], "logprobs": [-1.0], "reward": 0.0}]})
    >>> replay = Replay(per_question=1, max_age=8, seed=0)
    >>> replay.add([Segment(tree=tree, node_id=i, advantage=1.5 - i) for i in (1, 2)], iteration=0)
    >>> first, second = replay.take(0), replay.take(1)
    >>> sorted(segment.id for segment in first + second), len(replay)
    (['q/1', 'q/2'], 0)
    """

    per_question: int
    max_age: int
    seed: int
    waiting: list[Waiting] = field(default_factory=list)
    dropped: int = 0
    """Segments that grew too old, in the whole run."""

    def __len__(self) -> int:
        return sum(len(entry.advantages) for entry in self.waiting)

    def add(self, segments: Sequence[Segment], iteration: int) -> None:
        """Let an iteration's segments wait."""
        entries: dict[int, Waiting] = {}
        for segment in segments:
            entry = entries.setdefault(
                id(segment.tree), Waiting(tree=segment.tree, born=iteration, advantages={})
            )
            entry.advantages[segment.node_id] = segment.advantage
        self.waiting += entries.values()

    def take(self, iteration: int) -> list[Segment]:
        """What trains now: at most `per_question` segments of each question, older trees first, each segment once.

        The choice depends on the seed, the iteration and the tree's request id alone. What is too old afterwards
        is dropped and counted.
        """
        taken = []
        left: defaultdict[str, int] = defaultdict(lambda: self.per_question)
        for entry in self.waiting:
            ids, question = sorted(entry.advantages), question_of(entry.tree)
            rng = random.Random(f"{self.seed}/{iteration}/{entry.tree.request_id}")
            chosen = sorted(rng.sample(ids, min(left[question], len(ids))))
            left[question] -= len(chosen)
            for node_id in chosen:
                advantage = entry.advantages.pop(node_id)
                taken.append(Segment(tree=entry.tree, node_id=node_id, advantage=advantage))
        waiting, self.waiting = self.waiting, []
        for entry in waiting:
            if iteration - entry.born >= self.max_age:
                self.dropped += len(entry.advantages)
            elif entry.advantages:
                self.waiting.append(entry)
        return taken

    def state(self) -> str:
        """JSON from which `restore` goes on."""
        entries: list[dict[str, Any]] = [
            {
                "tree": RolloutTree.model_dump(
                    entry.tree, mode="json", include={"request_id", "nodes"}
                ),
                "born": entry.born,
                "advantages": entry.advantages,
            }
            for entry in self.waiting
        ]
        return json.dumps({"dropped": self.dropped, "waiting": entries})

    def restore(self, state: str) -> None:
        """Take up where `state` left off."""
        saved = json.loads(state)
        self.dropped = saved["dropped"]
        self.waiting = [
            Waiting(
                tree=RolloutTree.model_validate(entry["tree"]),
                born=entry["born"],
                advantages={int(node_id): a for node_id, a in entry["advantages"].items()},
            )
            for entry in saved["waiting"]
        ]
