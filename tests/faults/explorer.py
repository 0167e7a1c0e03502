"""Every interleaving of a model, breadth first: the shortest way to what breaks, and states without way home."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
Steps = Callable[[S], Iterable[tuple[str, S]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored(Generic[S]):
    """What exploring found."""

    states: int
    steps: int
    broken: str | None = None
    """The first invariant that does not hold, in words."""
    stuck: S | None = None
    """A state from which no path without further faults leads to the goal."""
    trace: tuple[str, ...] = ()
    """Shortest path to what is broken or stuck."""


def explore(
    start: S,
    steps: Steps[S],
    holds: Callable[[S], str | None],
    grows: Callable[[S, S], str | None],
    goal: Callable[[S], bool],
    is_fault: Callable[[str], bool],
) -> Explored[S]:
    """Visit every reachable state.

    Args:
        start: the first state.
        steps: label and successor of every step that a state allows.
        holds: what is broken in a state, or None.
        grows: what is broken between the two states of a step, or None.
        goal: where everything is well.
        is_fault: whether a label is a fault: no state may need one to reach the goal.
    """
    number = {start: 0}
    order = [start]
    came: list[tuple[int, str]] = [(-1, "")]
    back: list[list[int]] = [[]]
    queue = deque([0])
    count = 0

    def trace(index: int) -> tuple[str, ...]:
        labels = []
        while index > 0:
            index, label = came[index]
            labels.append(label)
        return tuple(reversed(labels))

    while queue:
        here = queue.popleft()
        state = order[here]
        for label, after in steps(state):
            count += 1
            there = number.get(after)
            broken = grows(state, after)
            if there is None:
                broken = broken or holds(after)
                there = number[after] = len(order)
                order.append(after)
                came.append((here, label))
                back.append([])
                queue.append(there)
            if broken:
                path = (*trace(here), label)
                return Explored(states=len(order), steps=count, broken=broken, trace=path)
            if not is_fault(label):
                back[there].append(here)
    home = [goal(state) for state in order]
    queue = deque(index for index, good in enumerate(home) if good)
    while queue:
        for before in back[queue.popleft()]:
            if not home[before]:
                home[before] = True
                queue.append(before)
    if all(home):
        return Explored(states=len(order), steps=count)
    stuck = home.index(False)
    return Explored(states=len(order), steps=count, stuck=order[stuck], trace=trace(stuck))
