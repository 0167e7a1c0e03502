"""The chain plan: whole responses, and Monte Carlo rollouts from the boundaries in them (DESIGN.md sections 4, 5).

    prompt -> [its rollouts where it is a boundary], and for each response
        segment -> [the rollouts from its end], segment -> [rollouts], ..., last segment

Responses are sampled as those of a group plan are, by the same streams. The rollouts from a boundary start when
the engine tells of a token behind it, while the response goes on; the engine has the keys and values before it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.branches import Branch, cut
from server.continuations import Continuations
from server.engines.base import Completion, News
from server.seeds import node_seed, state_seed
from server.tokens import Tokens
from shared.partition import boundaries, segments
from shared.pieces import Pieces
from shared.tree import FinishReason, Role
from shared.wire import ChainPlan, DelimiterPartition, Partition

State = tuple[int, ...]
"""[b] tokens from the prompt's end to a boundary."""


async def sample_chain(
    plan: ChainPlan, continuations: Continuations, *, early: bool = True
) -> Branch:
    """The root of a chain plan's tree, with all rollouts. Cancelling aborts every engine request.

    Args:
        plan: of the request.
        continuations: samples.
        early: start rollouts while responses grow; the tree is the same.

    Raises:
        RequestError: the prompt does not fit the engine.
        EngineError: the engine failed.
    """
    news: asyncio.Queue[Sequence[News]] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        growing = _Growing(plan, continuations, group)
        # A task of the group, so that it ends with it: an engine may still tell while a failed group ends.
        watching = group.create_task(growing.watch(news))
        responses = await continuations.after(
            (),
            plan.samples,
            seed=node_seed(continuations.seed, ()),
            on_news=news.put_nowait if early else None,
        )
        watching.cancel()
        placed = [growing.end(sample, response) for sample, response in enumerate(responses)]
    rollouts = {state: task.result() for state, task in growing.tasks.items()}
    return _assembled(responses, placed, rollouts)


class _Response:
    """What is known of one response.

    Args:
        tokens: decodes, where boundaries are found by text; else None.
    """

    def __init__(self, tokens: Tokens | None) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.pieces = tokens and Pieces(tokens.decode)
        self.rolled_out = 0
        """Boundaries from which rollouts have started."""

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add tokens."""
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        if self.pieces:
            self.pieces.extend(token_ids)

    def boundaries(self, partition: Partition) -> list[int]:
        """Those among the tokens so far; more tokens will change none of them."""
        return boundaries(partition, self.logprobs, self.pieces.texts if self.pieces else ())


@dataclass(frozen=True, slots=True)
class _Growing:
    """The responses of one request, and the rollouts from each state that they reach.

    Args:
        plan: of the request.
        continuations: samples.
        group: has the tasks.
    """

    plan: ChainPlan
    continuations: Continuations
    group: asyncio.TaskGroup
    tasks: dict[State, asyncio.Task[list[Branch]]] = field(default_factory=dict)
    """The rollouts, one engine request for each state."""
    responses: dict[int, _Response] = field(default_factory=dict)
    """By sample."""

    async def watch(self, news: asyncio.Queue[Sequence[News]]) -> None:
        """Roll out from boundaries as news of them come, until cancelled."""
        while True:
            for grown in await news.get():
                response = self._response(grown.sample)
                response.extend(grown.token_ids, grown.logprobs)
                self._roll_out_new(response)

    def end(self, sample: int, completion: Completion) -> list[int]:
        """Roll out from the boundaries that there was no news of; returns all boundaries of a response."""
        response, length = self._response(sample), len(completion.token_ids)
        known = len(response.token_ids)
        response.extend(completion.token_ids[known:], completion.logprobs[known:])
        self._roll_out_new(response)
        # News went past a stop string at which the completion was cut.
        return [b for b in response.boundaries(self.plan.partition) if b < length]

    def _response(self, sample: int) -> _Response:
        if sample not in self.responses:
            by_text = isinstance(self.plan.partition, DelimiterPartition)
            self.responses[sample] = _Response(self.continuations.tokens if by_text else None)
        return self.responses[sample]

    def _roll_out_new(self, response: _Response) -> None:
        """Start rollouts from a response's new boundaries, as far as the response is not cut at a stop string."""
        for b in response.boundaries(self.plan.partition)[response.rolled_out :]:
            state = tuple(response.token_ids[:b])
            if self.continuations.has_stop(state):
                return
            response.rolled_out += 1
            if state not in self.tasks:
                self.tasks[state] = self.group.create_task(self._roll_out(state))

    async def _roll_out(self, state: State) -> list[Branch]:
        """The rollouts from one state, each to its own end."""
        completions = await self.continuations.after(
            state,
            self.plan.value_rollouts,
            seed=state_seed(self.continuations.seed, state),
            priority=-1,  # before responses that have not begun, so that chains end
        )
        return [
            Branch(
                role=Role.ROLLOUT, completion=completion, response=(*state, *completion.token_ids)
            )
            for completion in completions
        ]


def _assembled(
    responses: Sequence[Completion],
    placed: Sequence[Sequence[int]],
    rollouts: Mapping[State, list[Branch]],
) -> Branch:
    """The tree: responses cut at their boundaries, each boundary's rollouts before the segment that follows."""
    root = Branch.prompt()
    root.children.extend(rollouts.get((), ()))
    for response, found in zip(responses, placed, strict=True):
        node, length = root, len(response.token_ids)
        # A response without tokens, which an engine may abort, is one segment without tokens.
        for start, end in segments(found, length) or [(0, 0)]:
            reason = FinishReason.LENGTH if end < length else response.finish_reason
            child = Branch(
                completion=cut(response, start, end, reason),
                response=tuple(response.token_ids[:end]),
            )
            if end < length:
                child.children.extend(rollouts[child.response])
            node.children.append(child)
            node = child
    return root
