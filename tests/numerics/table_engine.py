"""The enumerable policy as an engine, its trees through the real sampler, grading and wire nodes."""

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.answer import wire_nodes
from server.continuations import Continuations
from server.engines.base import (
    ApplyReport,
    Completion,
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Weights,
)
from server.engines.requests import check_request
from server.grading import Grading
from server.rewards.base import Grade
from server.sampler import sample
from shared.errors import EngineError, WeightsError
from shared.tree import FinishReason, RolloutTree
from shared.wire import Plan, Reward, Sampling
from tests.numerics.enumerable import END, HORIZON, PROMPT, STATES, Table, Vector


class TableEngine:
    """An `Engine` that samples from a `Table`: an exactly enumerable policy, for experiments on estimators alone.

    It has no text, no other temperature than 1, and takes no weights.
    """

    def __init__(self, table: Table) -> None:
        self._info = EngineInfo(
            engine="table",
            model="table",
            dtype="float64",
            device="cpu",
            vocab_size=PROMPT + table.questions,
            max_model_len=HORIZON + 3,
            eos_token_ids=(END,),
            max_batch=1 << 20,
            kv_tokens=1 << 40,
            block_tokens=1,
        )
        self._steps = [
            [_Step.of(table.logprobs[question, state]) for state in range(STATES)]
            for question in range(table.questions)
        ]

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._info

    @property
    def version(self) -> int:
        """Always the first."""
        return 0

    @property
    def digest(self) -> str:
        """Of nothing."""
        return ""

    @property
    def open_sequences(self) -> int:
        """None: each request is answered at once."""
        return 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample by inversion, one stream for each sample."""
        check_request(request, self._info)
        assert (request.temperature, request.top_p, request.top_k) == (1.0, 1.0, 0)
        prompt, *before = request.prompt_token_ids
        steps = self._steps[prompt - PROMPT]
        state = 0
        for letter in before:
            state = 2 * state + 1 + letter
        completions = [
            _sampled(steps, state, request.max_tokens, random.Random(request.seed + i))
            for i in range(request.samples)
        ]
        if request.on_completion is not None:
            for i, completion in enumerate(completions):
                request.on_completion(i, completion)
        return GenerateResult(completions=completions, computed_prefill_tokens=0, cached_tokens=0)

    async def load_weights(self, weights: Weights) -> ApplyReport:
        """Refuses."""
        raise WeightsError("a table takes no weights")

    async def live_digests(self, dtype: str) -> dict[str, str]:
        """Refuses."""
        raise EngineError("a table has no parameters")

    async def check(self) -> None:
        """Always well."""

    async def died(self) -> EngineError:
        """Never."""
        await asyncio.Event().wait()
        raise AssertionError("a table does not die")

    async def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, slots=True)
class _Step:
    below_a: float
    below_b: float
    logprobs: tuple[float, float, float]

    @classmethod
    def of(cls, logprobs: Vector) -> "_Step":
        a, b, end = map(float, logprobs)
        return cls(math.exp(a), math.exp(a) + math.exp(b), (a, b, end))


def _sampled(steps: Sequence[_Step], state: int, limit: int, rng: random.Random) -> Completion:
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < limit and (not tokens or tokens[-1] != END):
        if state >= STATES:
            tokens.append(END)
            logprobs.append(0.0)
            break
        step, u = steps[state], rng.random()
        token = 0 if u < step.below_a else 1 if u < step.below_b else END
        tokens.append(token)
        logprobs.append(step.logprobs[token])
        state = 2 * state + 1 + token
    ended = tokens[-1] == END
    return Completion(
        token_ids=tokens,
        logprobs=logprobs,
        versions=[(0, len(tokens))],
        finish_reason=FinishReason.STOP if ended else FinishReason.LENGTH,
    )


class LetterTokens:
    """Stands for the tokenizer: letters as text."""

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """One character a token; the end token has none."""
        return "".join("ab"[token] for token in token_ids if token < END)


class Grades:
    """Stands for the reward pool: grades in this process, since these functions cannot hang.

    Args:
        function: (response, reference) -> reward.
    """

    def __init__(self, function: Callable[[str, str], float]) -> None:
        self._function = function

    async def grade(
        self, name: str, texts: Sequence[str], reference: str, options: Mapping[str, Any]
    ) -> list[Grade]:
        """Grade of each text."""
        return [Grade(reward=self._function(text, reference)) for text in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One question's tree and what it cost."""

    question: int
    tree: RolloutTree
    tokens: int
    """Sampled, value rollouts included."""


async def sampled(table: Table, plan: Plan, count: int, seed: int) -> list[Sampled]:
    """`count` trees through the real sampler, grading and nodes; the questions in turn."""
    engine, tokens, found = TableEngine(table), LetterTokens(), []
    rewards: Any = Grades(
        lambda text, reference: table.reward(int(reference), ["ab".index(x) for x in text])
    )
    for number in range(count):
        question = number % table.questions
        continuations = Continuations(
            engine=engine,
            tokens=tokens,  # type: ignore[arg-type]  # it has what is asked of it here
            prompt=(PROMPT + question,),
            sampling=Sampling(max_tokens=HORIZON + 1),
            seed=seed + number,
        )
        root = await sample(plan, continuations)
        reward = Reward(name="table", reference=str(question))
        grading = Grading(tokens, rewards, reward)  # type: ignore[arg-type]  # as above
        await grading.below(root)
        nodes = wire_nodes(root, continuations.prompt, grading.grades, None)
        tree = RolloutTree(request_id=str(number), nodes=nodes)
        found.append(Sampled(question=question, tree=tree, tokens=continuations.counts.sampled))
    return found
