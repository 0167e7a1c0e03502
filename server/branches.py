"""What was sampled for one prompt, as a tree that still grows."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engines.base import Completion, spans
from shared.tree import FinishReason, Role

Path = tuple[int, ...]
"""Sibling positions from the prompt down to a node."""


@dataclass(slots=True, kw_only=True, eq=False)
class Branch:
    """A node while it grows. A chain's rollouts stand below every node whose state they start from."""

    role: Role = Role.SEGMENT
    completion: Completion | None
    """What was sampled; None for the prompt."""
    response: tuple[int, ...]
    """[T] tokens from the prompt's end to this node's end."""
    children: list["Branch"] = field(default_factory=list)

    @classmethod
    def prompt(cls) -> "Branch":
        """A root, from which nothing has been sampled yet."""
        return cls(role=Role.PROMPT, completion=None, response=())

    @property
    def before(self) -> tuple[int, ...]:
        """Tokens from the prompt's end to where this node begins."""
        own = 0 if self.completion is None else len(self.completion.token_ids)
        return self.response[: len(self.response) - own]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a branch stands in the tree."""

    branch: Branch
    parent: int | None
    """Position of the parent; None for the root."""
    depth: int


def walk(root: Branch) -> Iterator[Place]:
    """All branches, parents first, depth first. A branch below several parents comes once for each."""
    # A loop, because a chain may be deeper than Python's stack.
    waiting = [Place(root, None, 0)]
    position = 0
    while waiting:
        place = waiting.pop()
        yield place
        below = reversed(place.branch.children)
        waiting.extend(Place(child, position, place.depth + 1) for child in below)
        position += 1


def cut(completion: Completion, start: int, end: int, reason: FinishReason) -> Completion:
    """Tokens `start` to `end` - 1 of a completion, ended by `reason`.

    >>> whole = Completion(
    ...     token_ids=[7, 8, 9],
    ...     logprobs=[-0.1, -0.2, -0.3],
    ...     versions=[(3, 2), (4, 1)],
    ...     finish_reason=FinishReason.STOP,
    ... )
    >>> cut(whole, 1, 3, FinishReason.LENGTH).versions
    [(3, 1), (4, 1)]
    """
    versions = [version for version, count in completion.versions for _ in range(count)]
    return Completion(
        token_ids=completion.token_ids[start:end],
        logprobs=completion.logprobs[start:end],
        versions=spans(versions[start:end]),
        finish_reason=reason,
    )
