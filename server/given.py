"""Nodes that a request gives, because another attempt at its tree has returned them: checked, and put in place.

A server grows only what is missing. With a seed the missing siblings draw from the streams that they would have
had, so that with equal weights the tree comes out as if nothing had happened.
"""

from collections.abc import Mapping
from itertools import groupby

from server.branches import Path
from server.engines.base import Completion, EngineInfo
from shared.errors import RequestError
from shared.tree import FinishReason
from shared.wire import GivenNode, GroupPlan, RolloutTreeRequest, TreePlan

ROUNDING = 1e-3
"""By so much a logprob may be above 0: of a token that is all but certain."""
Given = Mapping[Path, Completion]
"""What was sampled, by sibling positions from the prompt; each with its parent."""


def check_given(request: RolloutTreeRequest, prompt_tokens: int, info: EngineInfo) -> None:
    """Refuse given nodes that cannot stand in the tree that is asked for.

    Args:
        request: what is asked.
        prompt_tokens: of the prompt.
        info: of the engine.

    Raises:
        RequestError: (422) names the node and what is wrong with it.
    """
    if not request.given:
        return
    plan = request.plan
    if not request.takes_given or not isinstance(plan, TreePlan | GroupPlan):
        raise RequestError(
            "given", "only for plans tree and group, without savings.probe and "
            "savings.branch_tokens; leave it out, and the tree is sampled from its start",
        )  # fmt: skip
    checks = _Checks(plan, request.sampling.max_tokens, prompt_tokens, info)
    ends: dict[Path, int] = {(): 0}
    places = sorted(enumerate(request.given), key=lambda pair: pair[1].key.count("."))
    for place, node in places:
        checks.check(f"given.{place}", node, ends)


def usable(request: RolloutTreeRequest, version: int, newest: int) -> dict[Path, Completion]:
    """The given nodes whose weights are good enough, with all their ancestors.

    Args:
        request: checked.
        version: of the engine's weights: a tree that is begun anew with each version has nodes of this one alone.
        newest: version that this server has heard of; nodes of later ones are of no use.
    """
    kept: dict[Path, Completion] = {}
    for node in sorted(request.given, key=lambda node: node.key.count(".")):
        path = path_of(node.key)
        versions = {version for version, _ in node.versions}
        stale = min(versions) < request.min_weight_version
        unheard = max(versions) > newest
        other = request.in_flight == "restart" and versions != {version}
        if stale or unheard or other or (len(path) > 1 and path[:-1] not in kept):
            continue
        kept[path] = Completion(
            token_ids=node.token_ids,
            logprobs=node.logprobs,
            versions=node.versions,
            finish_reason=FinishReason(node.finish_reason),
        )
    return kept


def path_of(key: str) -> Path:
    """Sibling positions of a key.

    >>> path_of("0.2.1")
    (0, 2, 1)
    """
    return tuple(map(int, key.split(".")))


def gaps(first: int, count: int, taken: set[int]) -> list[tuple[int, int]]:
    """Runs of positions that are not taken, each (its first, how many), of `count` positions from `first`.

    >>> gaps(0, 6, {1, 2, 5})
    [(0, 1), (3, 2)]
    """
    missing = [at for at in range(first, first + count) if at not in taken]
    runs = (list(run) for _, run in groupby(enumerate(missing), lambda pair: pair[1] - pair[0]))
    return [(run[0][1], len(run)) for run in runs]


class _Checks:
    """What may be said of one node, given its ancestors."""

    def __init__(
        self, plan: TreePlan | GroupPlan, max_tokens: int, prompt_tokens: int, info: EngineInfo
    ) -> None:
        self._factors = plan.branch_factors if isinstance(plan, TreePlan) else [plan.samples]
        self._plan = plan
        self._max_tokens = max_tokens
        self._room = info.max_model_len - prompt_tokens
        self._vocabulary = info.vocab_size

    def check(self, field: str, node: GivenNode, ends: dict[Path, int]) -> None:
        """Check one node and note where it ends, if the response may go on there.

        Args:
            field: its place in the request.
            node: to check.
            ends: tokens of the response at the end of every node so far; negative where it is over.
        """
        path, tokens = path_of(node.key), len(node.token_ids)
        self._check_place(field, path, ends)
        unknown = next((token for token in node.token_ids if token >= self._vocabulary), None)
        if unknown is not None:
            detail = f"{unknown} is no token of the model, which has {self._vocabulary}"
            raise RequestError(f"{field}.token_ids", detail)
        likely = next((logprob for logprob in node.logprobs if logprob > ROUNDING), None)
        if likely is not None:
            raise RequestError(f"{field}.logprobs", f"{likely} is above 0, and no logprob can be")
        start = ends[path[:-1]]
        end, most = start + tokens, self._most(start, len(path))
        if tokens > most:
            detail = f"{tokens} tokens, and the plan allows {most} here"
            raise RequestError(f"{field}.token_ids", detail)
        ended = node.finish_reason == "stop" or end >= min(self._max_tokens, self._room)
        if not ended and tokens < most and not self._aligned:
            detail = f'"length", and {tokens} tokens are fewer than the {most} that end it'
            raise RequestError(f"{field}.finish_reason", detail)
        ends[path] = -1 if ended else end

    def _check_place(self, field: str, path: Path, ends: dict[Path, int]) -> None:
        name, depth = ".".join(map(str, path)), len(path)
        if depth > len(self._factors):
            detail = f"{name!r} is at depth {depth}, and the plan ends at {len(self._factors)}"
        elif path[-1] >= self._factors[depth - 1]:
            detail = f"{name!r} is beyond the {self._factors[depth - 1]} children that the plan has there"
        elif path in ends:
            detail = f"{name!r} is there twice"
        elif path[:-1] not in ends:
            detail = f"the parent of {name!r} is missing; give it too, or leave this one out"
        elif ends[path[:-1]] < 0:
            detail = f"the parent of {name!r} ends its response; nothing can follow"
        else:
            return
        raise RequestError(f"{field}.key", detail)

    @property
    def _aligned(self) -> bool:
        return isinstance(self._plan, TreePlan) and self._plan.align

    def _most(self, start: int, depth: int) -> int:
        """Most tokens of a node that begins after `start` tokens of the response."""
        left = min(self._max_tokens, self._room) - start
        if isinstance(self._plan, GroupPlan) or depth == len(self._factors):
            return left
        # Where ends are moved to the blocks of the engine's cache, those of the other server may be others.
        moved = self._plan.segment_tokens // 2 if self._plan.align else 0
        return min(left, self._plan.segment_tokens + moved)
