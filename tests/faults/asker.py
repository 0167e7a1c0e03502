"""Who asks a server for trees and for its weights all the time, while a test breaks something beside it."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from faults.conftest import Run
from faults.parts import Member, until

BOUND_S = 60.0
"""Of anything here: nothing waits for ever."""
NOBODY = "nobody listens there any more"
TREE = {
    "prompt": "Ana has 12 apples. She buys 5 more. How many apples does Ana have now?\n",
    "plan": {"kind": "tree", "branch_factors": [6, 4, 4, 2], "segment_tokens": 24},
    "sampling": {"max_tokens": 120, "temperature": 1.0},
    "reward": {"name": "gsm8k", "reference": "17"},
}


@dataclass
class Asker:
    """Asks a server for trees all the time, whole and as streams, and for its weights; notes every answer."""

    member: Member
    run: Run
    trees: int = 0
    """That ended well."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Problem documents of the others."""
    lives: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: bool = False

    @contextlib.contextmanager
    def asking(self) -> Iterator["Asker"]:
        """Ask while the block runs, once trees come."""
        works = [self.ask_whole, self.ask_stream, self.ask_live]
        threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in threads:
            thread.start()
        try:
            self.gone_on()
            yield self
        finally:
            self.ended = True
            for thread in threads:
                thread.join(BOUND_S)
            assert not any(thread.is_alive() for thread in threads), "an answer never came"
        assert not self.wrong, self.wrong

    def ask_whole(self) -> None:
        """One tree after the other, until one is refused."""
        self.ask_trees("application/json", lambda answer: answer.json())

    def ask_stream(self) -> None:
        """The same, where what fails is the last line."""
        self.ask_trees(
            "application/x-ndjson", lambda answer: json.loads(answer.text.splitlines()[-1])
        )

    def ask_trees(self, form: str, last: Callable[[httpx.Response], dict[str, Any]]) -> None:
        with httpx.Client(base_url=self.member.url, timeout=BOUND_S) as client:
            while not self.ended:
                try:
                    answer = client.post("/rollout_tree", json=TREE, headers={"Accept": form})
                except httpx.ConnectError:  # asked for just after the server ended
                    self.refused.append({"status": 503, "detail": NOBODY})
                    return
                except httpx.TransportError as error:  # an answer that was owed
                    self.wrong.append(repr(error))
                    return
                said = last(answer)
                said = said.get("problem", said)
                if said.get("status"):
                    if answer.headers["content-type"] != "application/problem+json":
                        answer.raise_for_status()  # a stream that had begun
                    self.refused.append(said)
                    return
                self.trees += 1

    def ask_live(self) -> None:
        """What it says it holds is what it holds, whenever it says anything."""
        with httpx.Client(base_url=self.member.url, timeout=BOUND_S) as client:
            while not self.ended:
                try:
                    answer = client.get("/weights/live")
                except httpx.TransportError:
                    return
                if answer.status_code == 200:
                    self.lives.append(live := answer.json())
                    if live["tensors"] != self.run.tensors_of(live["version"]):
                        self.wrong.append(f"mixed weights under version {live['version']}")

    def gone_on(self) -> None:
        """Wait until trees have begun and ended well from now on."""
        before = self.trees
        until(lambda: self.trees > before + 2, "trees are sampled", BOUND_S)

    def told(self) -> None:
        """Both trees that could not end were told so; one asked for just afterwards, that the server ends."""
        assert [problem["status"] for problem in self.refused] == [503, 503], self.refused
        for problem in self.refused:
            # A tree may have had its last token already, and only its reward to come.
            words = ("vLLM", "engine", "this server is draining", NOBODY)
            assert any(word in problem["detail"] for word in words), problem
