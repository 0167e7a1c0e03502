"""`spoke train` as a process that can be killed and resumed, and what it leaves behind."""

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from faults.parts import end, processes, run_trainer, send, until

from shared.keys import Keys

CONFIG = """
run = "{run}"
seed = 270 # its questions are, step for step, such that leaves differ
[model]
path = "{model}"
dtype = "float32"
[data]
train = "problems:train?seed=1&count=40"
heldout = "problems:heldout?seed=1&count=4"
[reward]
options = {{ unfinished = -1.0 }} # so that leaves differ although the tiny model answers nothing right
[rollout]
questions = {questions}
plan = {{ kind = "tree", branch_factors = [3, 2], segment_tokens = 16 }}
max_tokens = 72
timeout_s = 60.0
[trainer]
steps = {steps}
learning_rate = 1e-5
warmup_steps = 0
kl_coef = 0.0
checkpoint_every = 1
[fleet]
dtype = "bfloat16"
max_staleness = {staleness}
wait_s = 60
pause_s = 120
[evaluation]
questions = 2
samples = 1
greedy = false
"""


@dataclass
class Training:
    """One run of the real trainer, over as many processes as it takes."""

    folder: Path
    redis_url: str
    settings: dict[str, Any]
    arguments: tuple[str, ...] = ()
    """Further ones of `spoke train`."""
    process: Any = None

    @property
    def log(self) -> str:
        path = self.folder / "trainer.log"
        return path.read_text() if path.exists() else ""

    @property
    def run_dir(self) -> Path:
        return self.folder / "training"

    def start(self, *, resume: bool = False) -> None:
        config = self.folder / "train.toml"
        config.write_text(CONFIG.format(**self.settings))
        argv = ["train", str(config), "--run-dir", str(self.run_dir), *self.arguments]
        arguments = (
            argv + ["--resume"] * resume,
            str(self.folder / "trainer.log"),
            self.redis_url,
        )
        self.process = processes().Process(target=run_trainer, args=arguments)
        self.process.start()

    def kill(self) -> None:
        send(self.process, signal.SIGKILL)

    def end(self) -> None:
        if self.process is not None:
            end(self.process)

    def until(self, condition: Callable[[], Any], what: str, bound_s: float = 60.0) -> Any:
        """As `until`, and the trainer lives meanwhile."""

        def look() -> Any:
            assert self.process.exitcode is None, f"it ended:\n{self.log[-3000:]}"
            return condition()

        return until(look, f"{what}; the trainer says:\n{self.log[-2000:]}", bound_s)

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of its metrics, over all processes."""
        path = self.run_dir / "metrics.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # a kill cut it
                continue
        return found

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return found

    def checkpoints(self) -> list[Path]:
        return sorted((self.run_dir / "checkpoints").glob("step-??????"))

    def versions(self) -> dict[int, bool]:
        """Version folders of its store -> whether the manifest is there."""
        root = self.run_dir / "weights" / str(self.settings["run"])
        return {
            int(path.name[1:]): (path / "manifest.json").exists()
            for path in root.glob("v??????")
        }  # fmt: skip


@dataclass
class HeadWatch:
    """Looks at a run's head all the time, whatever becomes of its Redis."""

    url: str
    run: str
    seen: list[tuple[int, str]] = field(default_factory=list)
    """(version, manifest's digest) of each head, in order."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "HeadWatch":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        with redis.Redis.from_url(self.url, decode_responses=True) as raw:
            while not self._stop.wait(0.01):
                try:
                    head: Any = raw.hgetall(Keys(self.run).head)
                except redis.RedisError:
                    continue
                found = head and (int(head["version"]), head["manifest_digest"])
                if found and (not self.seen or self.seen[-1] != found):
                    self.seen.append(found)

    def check(self) -> None:
        """It only grew, and no number ever stood for two things.

        A Redis that restarts empty may be told an older head by a server before the trainer tells it the newest.
        """
        numbers = [version for version, _ in dict.fromkeys(self.seen)]
        assert numbers == sorted(set(numbers)), numbers
