"""What one request may cost before anything is sampled: bytes and seconds of its body, and the size of its plan.

What no server would take is refused by the schema (`shared/wire.py`); the prompt's length by the engine's context.
"""

import math
from dataclasses import dataclass

from shared.errors import RequestError
from shared.wire import MOST_MESSAGES, ChainPlan, Plan, RolloutTreeRequest, TreePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a server; each refusal names the field and the bound."""

    body_bytes: int = 16 * 2**20
    """Of a request's body."""
    body_idle_s: float = 10.0
    """Longest wait for the next piece of a body, seconds."""
    body_s: float = 60.0
    """Longest wait for a whole body, seconds."""
    send_s: float = 60.0
    """Longest wait for a reader to take the next piece of an answer, seconds."""
    depth: int = 16
    """Branch factors of a tree plan."""
    branch_factor: int = 256
    samples: int = 4096
    """Responses of a chain or a group plan, and rollouts for each of a chain's boundaries."""
    leaves: int = 16_384
    """Of a plan; see `leaves`."""
    messages: int = MOST_MESSAGES
    """Of a chat."""

    def check(self, request: RolloutTreeRequest) -> None:
        """Refuse a request that is too large for this server.

        Raises:
            RequestError: 422 for one number, 413 for what they multiply to.
        """
        plan = request.plan
        if isinstance(plan, TreePlan):
            _at_most(len(plan.branch_factors), self.depth, "plan.branch_factors", "levels")
            for place, factor in enumerate(plan.branch_factors):
                _at_most(factor, self.branch_factor, f"plan.branch_factors.{place}", "children")
        else:
            _at_most(plan.samples, self.samples, "plan.samples", "samples")
        if isinstance(plan, ChainPlan):
            _at_most(plan.value_rollouts, self.samples, "plan.value_rollouts", "rollouts")
        _at_most(len(request.messages or ()), self.messages, "messages", "messages")
        count = leaves(plan)
        if count > self.leaves:
            raise RequestError(
                "plan",
                f"its {_rounded(count)} leaves are more than this server's bound of {self.leaves}; "
                "ask for fewer in several requests, or raise --max-leaves",
                status=413,
            )


def leaves(plan: Plan) -> int:
    """Leaves that a plan has when no response ends early.

    Of a chain, with one boundary in each response: where the others lie is not known before it is sampled.

    >>> leaves(TreePlan(branch_factors=[6, 6, 6], segment_tokens=600))
    216
    >>> leaves(ChainPlan(samples=8, value_rollouts=9))
    80
    """
    if isinstance(plan, TreePlan):
        return math.prod(plan.branch_factors)
    if isinstance(plan, ChainPlan):
        return plan.samples * (1 + plan.value_rollouts)
    return plan.samples


def _at_most(number: int, bound: int, field: str, what: str) -> None:
    if number > bound:
        raise RequestError(
            field, f"{number} {what} are more than this server's bound of {bound}; ask for fewer"
        )


def _rounded(count: int) -> str:
    """A number that people can read.

    >>> _rounded(216), _rounded(256**16)
    ('216', '3.4e+38')
    """
    return str(count) if count < 10**9 else f"{count:.2g}"
