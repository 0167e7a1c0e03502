"""Rollout trees of every shape for property tests."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from shared.tree import FinishReason, Node, Role
from shared.wire import RolloutTreeResponse, Timing, Usage, WeightVersions

examples = settings(max_examples=80, deadline=None, derandomize=True)
"""How long an example takes is the machine's affair."""

_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_LOGPROBS = _FLOATS | st.floats(width=32, allow_nan=False, allow_infinity=False)
_COUNTS = st.integers(0, 2**63 - 1)
_IDS = st.sampled_from([2**8, 2**16, 2**24, 2**32, 2**63])


@st.composite
def _versions(draw: st.DrawFn, count: int) -> list[tuple[int, int]]:
    if draw(st.booleans()):
        return []
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    ends = zip([0, *cuts], [*cuts, count], strict=True)
    return [(draw(_COUNTS), end - start) for start, end in ends]


@st.composite
def _node(draw: st.DrawFn, position: int, above: list[Node], largest: int) -> Node:
    parent = None if position == 0 else draw(st.sampled_from(above))
    ids = draw(st.lists(st.integers(0, largest - 1), max_size=6))
    one_each = st.lists(_LOGPROBS, min_size=len(ids), max_size=len(ids))
    return Node(
        id=position, parent=None if parent is None else parent.id,
        depth=0 if parent is None else parent.depth + 1,
        role=draw(st.sampled_from(Role)), token_ids=ids, logprobs=draw(st.none() | one_each),
        versions=draw(_versions(len(ids))),
        finish_reason=draw(st.none() | st.sampled_from(FinishReason)),
        text=draw(st.none() | st.text()), reward=draw(st.none() | _FLOATS),
        reward_error=draw(st.none() | st.text()), value=draw(st.none() | _FLOATS),
    )  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> RolloutTreeResponse:
    """Any answer: empty segments, null logprobs, all roles, several versions, any text, ids of any size."""
    nodes: list[Node] = []
    largest = draw(_IDS)
    for position in range(draw(st.integers(1, 8))):
        nodes.append(draw(_node(position, nodes, largest)))
    names: dict[str, Any] = {
        name: draw(st.text(max_size=5)) for name in ("request_id", "server_id", "model")
    }
    return RolloutTreeResponse(
        nodes=nodes,
        usage=draw(st.builds(Usage, **dict.fromkeys(Usage.model_fields, _COUNTS))),
        weight_versions=draw(st.builds(WeightVersions, min=_COUNTS, max=_COUNTS)),
        timing=draw(st.builds(Timing, **dict.fromkeys(Timing.model_fields, _FLOATS))),
        **names,
    )
