"""`POST /rollout_tree`: the request, the plans and the answer (DESIGN.md section 5).

Unknown fields are refused, so that a misspelt option never passes silently.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shared.errors import RequestError
from shared.tree import RolloutTree


class WireModel(BaseModel):
    """Base of every model on the wire: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RequestModel(WireModel):
    """Base of what clients send: other types, such as "5" for 5, and numbers that are none are refused too.

    A refusal costs little, however much is wrong: lists end at their first bad item, objects at too many fields.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, sent: object) -> object:
        if isinstance(sent, dict) and len(sent) > MOST_FIELDS:
            raise ValueError(f"{len(sent)} fields are more than any object here has; remove them")
        return sent


MOST_FIELDS = 64
"""No object has so many fields: one that does is refused as a whole, and not with an error for each."""
MOST_MESSAGES = 1024
"""Of a chat."""
MOST_TOKENS = 2**31 - 1
"""No count of tokens is larger: engines keep them in 32 bits."""
LONGEST_STOP = 200
"""Characters of a stop string or a delimiter."""
LONGEST_REFERENCE = 1 << 20
"""Characters of what a reward compares with: it goes out again with every batch of leaves."""
Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
KEY_PATTERN = r"^((0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*)?$"
"""Of a node's key: positions among siblings, from the prompt, such as `0.2.1`; the prompt's own is empty."""


class TreePlan(RequestModel):
    """SPO-tree: `branch_factors[d]` children for each live node at depth d."""

    kind: Literal["tree"] = "tree"
    branch_factors: list[Annotated[int, Field(ge=1, le=256)]] = Field(
        min_length=1,
        max_length=16,
        fail_fast=True,
        description="Children of each live node, by depth.",
    )
    segment_tokens: Count = Field(
        description="Most tokens of a segment; children at the last depth run to their end."
    )
    align: bool = Field(
        default=False,
        description="Move the ends of segments, by at most half a block of the engine's cache and half a segment, "
        "so that a branch computes one token of what precedes it. Segments then differ in length.",
    )


class FixedPartition(RequestModel):
    """A boundary at the prompt and after every `tokens` tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: Count = Field(description="M, tokens of a segment.")


class CutpointsPartition(RequestModel):
    """SPO-chain: a boundary before every `interval`-th cutpoint, starting with the first."""

    kind: Literal["cutpoints"] = "cutpoints"
    threshold: float = Field(
        default=0.9, gt=0.0, le=1.0, description="rho: a cutpoint's behaviour probability is below."
    )
    interval: Count = Field(default=5, description="Cutpoints from one boundary to the next.")


class DelimiterPartition(RequestModel):
    """VinePPO's steps: a boundary at the prompt and after each occurrence of a text."""

    kind: Literal["delimiter"] = "delimiter"
    delimiter: str = Field(default="\n", min_length=1, max_length=LONGEST_STOP)


class WholePartition(RequestModel):
    """One segment: the prompt is the only boundary."""

    kind: Literal["whole"] = "whole"


Partition = Annotated[
    FixedPartition | CutpointsPartition | DelimiterPartition | WholePartition,
    Field(discriminator="kind"),
]


class ChainPlan(RequestModel):
    """SPO-chain, VinePPO: whole responses, and Monte Carlo rollouts from the boundaries in them.

    A response is a chain of nodes of role `segment`, one for each segment. Where a segment ends at a boundary, its
    node also has `value_rollouts` children of role `rollout`; where the prompt is a boundary, so has the prompt.
    Responses that reach the same boundary by the same tokens share its rollouts: they are sampled and counted
    once, and stand below each of the nodes.
    """

    kind: Literal["chain"] = "chain"
    samples: int = Field(ge=1, le=4096, description="Responses.")
    partition: Partition = CutpointsPartition()
    value_rollouts: int = Field(ge=1, le=4096, description="N, rollouts for each boundary.")


class GroupPlan(RequestModel):
    """GRPO, RLOO, PPO: `samples` independent whole responses."""

    kind: Literal["group"] = "group"
    samples: int = Field(ge=1, le=4096)


Plan = Annotated[TreePlan | ChainPlan | GroupPlan, Field(discriminator="kind")]


_TAGGED = frozenset({"plan", "partition"})


def field_path(location: Sequence[int | str]) -> str:
    """Dotted path of a field, in the words of the request, from a validation error's location.

    A discriminated union puts its tag behind the union's own name; what was sent has no such level.

    >>> field_path(["plan", "chain", "partition", "delimiter", "delimiter"])
    'plan.partition.delimiter'
    """
    return ".".join(
        str(part)
        for before, part in zip(["", *location], location, strict=False)
        if before not in _TAGGED or part in _TAGGED
    )


COLDEST = 0.01
"""The lowest temperature above greedy: what vLLM raises lower ones to."""


class Sampling(RequestModel):
    """How tokens are drawn."""

    temperature: float = Field(
        default=1.0, ge=0.0, le=2.0, description="0 is greedy; vLLM takes at most 2."
    )
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=MOST_TOKENS, description="0 is off.")
    max_tokens: Count = Field(default=1024, description="Bound of the response, prompt to leaf.")
    stop: list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]] = Field(
        default_factory=list, max_length=16, fail_fast=True
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @field_validator("temperature")
    @classmethod
    def _takes_it_as_it_is(cls, value: float) -> float:
        if 0.0 < value < COLDEST:
            raise ValueError(
                f"{value} is below {COLDEST}, which vLLM would take instead; use 0 for greedy"
            )
        return value


class Savings(RequestModel):
    """Early decisions that save tokens, for plans `tree` and `group`; all are off by default."""

    settle_after: int | None = Field(
        default=None,
        ge=2,
        description="Sample so many children of a node first, with all below them; where all their leaves have "
        "one reward, the node's other children are not sampled: no advantage below it would differ from zero, "
        "unless those would have disagreed.",
    )
    probe: int | None = Field(
        default=None,
        ge=2,
        le=4096,
        description="Sample so many whole responses first; where all have one reward, they are the whole tree. "
        "For plan `tree`.",
    )
    branch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="A node below the prompt whose children would take the tree over so many tokens goes on as "
        "one child that runs to its end, instead of branching. Children count as `segment_tokens` while they "
        "grow. For plan `tree`.",
    )

    @property
    def look_at_rewards(self) -> bool:
        """Does any of them need the leaves' rewards?"""
        return self.settle_after is not None or self.probe is not None

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError, which says what to do, where one of them has no meaning for a plan."""
        if self == Savings():
            return
        if isinstance(plan, ChainPlan):
            raise ValueError("savings are for plans tree and group; leave them out of a chain")
        for name in ("probe", "branch_tokens"):
            if getattr(self, name) is not None and isinstance(plan, GroupPlan):
                raise ValueError(
                    f"savings.{name} is for plan tree; a group has savings.settle_after"
                )


class Reward(RequestModel):
    """Which reward function grades the leaves, and against what."""

    name: str = Field(min_length=1, max_length=200)
    reference: str = Field(default="", max_length=LONGEST_REFERENCE)
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="`unfinished`: reward of a response cut by max_tokens (0.0).",
    )


class Message(RequestModel):
    """One chat message."""

    role: str = Field(min_length=1, max_length=64)
    content: str


class GivenNode(RequestModel):
    """A node that an earlier attempt at the same tree returned, as the line of its stream had it."""

    key: str = Field(
        min_length=1,
        max_length=64,
        pattern=KEY_PATTERN,
        description="Positions among siblings, from the prompt.",
    )
    token_ids: list[TokenId] = Field(min_length=1, fail_fast=True)
    logprobs: list[float] = Field(fail_fast=True, description="[T] one for each token.")
    versions: list[
        Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], Count], Strict(False)]
    ] = Field(fail_fast=True, description="Spans [weight version, token count].")
    finish_reason: Literal["stop", "length"]

    @field_validator("logprobs")
    @classmethod
    def _one_for_each_token(cls, value: list[float], info: ValidationInfo) -> list[float]:
        tokens = len(info.data.get("token_ids", value))
        if len(value) != tokens:
            raise ValueError(f"{len(value)} logprobs for {tokens} tokens")
        return value

    @field_validator("versions")
    @classmethod
    def _add_up(cls, value: list[tuple[int, int]], info: ValidationInfo) -> list[tuple[int, int]]:
        spanned = sum(count for _, count in value)
        tokens = len(info.data["token_ids"]) if "token_ids" in info.data else spanned
        if spanned != tokens:
            raise ValueError(f"its spans are of {spanned} tokens, and there are {tokens}")
        return value


def _exactly_one(**types: str) -> dict[str, Any]:
    """JSON schema: one of some properties is there and not null."""
    return {
        "oneOf": [
            {"required": [name], "properties": {name: {"type": kind}}}
            for name, kind in types.items()
        ]
    }


class RolloutTreeRequest(RequestModel):
    """One prompt, one tree."""

    model_config = ConfigDict(
        json_schema_extra=_exactly_one(prompt="string", messages="array", prompt_token_ids="array")
    )

    request_id: str | None = Field(default=None, min_length=1, max_length=200)
    prompt: str | None = None
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=MOST_MESSAGES, fail_fast=True
    )
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1, fail_fast=True)
    plan: Plan
    sampling: Sampling = Sampling()
    reward: Reward | None = Field(default=None, description="Without one, leaves carry no reward.")
    savings: Savings = Savings()
    min_weight_version: int = Field(default=0, ge=0, lt=2**63)
    in_flight: Literal["continue", "restart"] = Field(
        default="continue",
        description="What becomes of a tree that grows while the server takes other weights: it goes on with "
        "them, and `versions` says which token is whose; or it is begun anew with them.",
    )
    given: list[GivenNode] = Field(
        default_factory=list,
        fail_fast=True,
        description="Nodes that another attempt returned before it failed: only what is missing is sampled. "
        "Each with its parent, in any order. For plans tree and group, without savings.probe and "
        "savings.branch_tokens.",
    )
    return_text: bool = True

    @property
    def takes_given(self) -> bool:
        """May the tree be grown on from nodes that another attempt returned?

        A chain's nodes are told when all are there; a probe's take the places of the tree's; and where
        `branch_tokens` ends the branching depends on the order in which nodes happened to end.
        """
        savings = self.savings
        decided = savings.probe is not None or savings.branch_tokens is not None
        return not isinstance(self.plan, ChainPlan) and not decided

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [
            self.prompt is not None,
            self.messages is not None,
            self.prompt_token_ids is not None,
        ]
        if sum(given) != 1:
            raise ValueError("give exactly one of prompt, messages, prompt_token_ids")
        return self

    @model_validator(mode="after")
    def _savings_fit(self) -> Self:
        self.savings.check_plan(self.plan)
        if self.savings.look_at_rewards and self.reward is None:
            raise ValueError("savings.settle_after and savings.probe need a reward")
        return self


class Usage(WireModel):
    """Tokens of one tree."""

    prompt_tokens: int
    sampled_tokens: int
    given_tokens: int = Field(
        default=0, description="In nodes that the request gave, which were not sampled again."
    )
    discarded_tokens: int = Field(
        default=0,
        description="Sampled for this tree and in none of its nodes: before it was begun anew with other weights, "
        "as far as this server knows of it, and in given nodes of weights that it cannot be of.",
    )
    computed_prefill_tokens: int
    cached_tokens: int

    @property
    def spent_tokens(self) -> int:
        """All that was sampled for the tree, at whichever server: what a budget counts."""
        return self.sampled_tokens + self.given_tokens + self.discarded_tokens


class WeightVersions(WireModel):
    """Lowest and highest weight version that sampled a token of the tree."""

    min: int
    max: int


class Timing(WireModel):
    """Seconds."""

    queue_s: float = Field(description="From the request's arrival to its first engine request.")
    sample_s: float = Field(
        description="From there to the last token; waiting in the engine counts."
    )
    reward_s: float = Field(description="Grading the leaves.")


class RolloutTreeResponse(RolloutTree):
    """The answer: the tree, and who made it of what."""

    server_id: str
    model: str
    usage: Usage
    weight_versions: WeightVersions
    timing: Timing


class Problem(BaseModel):
    """`application/problem+json` (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = Field(default=None, description="Dotted path of the offending field.")
    request_id: str | None = None

    def as_error(self) -> RequestError:
        """The same as an exception; its `status` says whether the request is at fault or another try may help."""
        return RequestError(self.field or "request", self.detail, status=self.status)
