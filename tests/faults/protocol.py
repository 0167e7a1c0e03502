"""Every step of the model's world; what it is made of is in `world.py`, what it promises in `promises.py`."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.faults.server_steps import server_steps
from tests.faults.trainer_steps import trainer_steps
from tests.faults.world import Bounds, Rules, World, spend

FAULTS = ("crashes", "expires", "restarts", "damages")


def is_fault(label: str) -> bool:
    """Is this step something that goes wrong?"""
    return label.split()[1] in FAULTS


@dataclass(frozen=True, slots=True)
class Protocol:
    """The world's steps under some rules and bounds."""

    rules: Rules
    bounds: Bounds

    def steps(self, w: World) -> Iterator[tuple[str, World]]:
        """Label and result of every step that is possible now."""
        for i, trainer in enumerate(w.trainers):
            for label, t, rest in trainer_steps(self.rules, w, trainer):
                pair = (t, w.trainers[1]) if i == 0 else (w.trainers[0], t)
                yield f"{trainer.name} {label}", rest._replace(trainers=pair)
        for i, server in enumerate(w.servers):
            for label, s, rest in server_steps(self.rules, self.bounds, w, server):
                # The servers are alike: which of them is the first does not matter.
                servers = tuple(sorted((s, *w.servers[:i], *w.servers[i + 1 :])))
                yield f"server {label}", rest._replace(servers=servers)
        if w.lease[0]:
            over = ("dead", "stopped")
            if any(t.name == w.lease[0] and t.phase in over for t in w.trainers):
                yield "lease ends", w._replace(lease=("", 0))
            elif w.faults[1]:
                yield "lease expires", spend(w, 1)._replace(lease=("", 0))
        if w.faults[2] and (w.head or w.lease[0]):
            yield "redis restarts empty", spend(w, 2)._replace(lease=("", 0), head=None)
