"""A policy small enough to enumerate: every state value and every expected gradient is known exactly.

A response is a string of at most `HORIZON` letters, a or b, and an end token, which may come early and must come
after the last letter. The policy is a table: three logits for each question and each string of letters so far.
Each question has its own reward, 1 where the letters at two decisive places are the right ones: few steps decide.

`table_engine` samples it through the real sampler, `gradients` takes it through the real packing and loss, and
`estimators` has the algorithms with what enumeration says they should give.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

HORIZON = 6
"""Most letters of a response; the end token makes one more."""
END = 2
"""Letters are the tokens 0 and 1; a question's prompt is the one token PROMPT + question."""
PROMPT = 3
STATES = 2**HORIZON - 1
"""Strings of fewer than HORIZON letters: where the policy has a choice. Below string s stand 2s + 1 and 2s + 2."""
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One of all responses to a question."""

    tokens: tuple[int, ...]
    """[T] letters and the end token."""
    states: tuple[int, ...]
    """[T + 1] the state before each token, and after the last one; states from STATES on have no choice."""
    logprobs: tuple[float, ...]
    """[T] nats."""
    probability: float
    reward: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Tabular softmax policy and its questions.

    Args:
        logits: [questions, STATES, 3].
        decisive: for each question {place: letter}.
    """

    logits: Vector
    decisive: tuple[Mapping[int, int], ...]

    @classmethod
    def seeded(cls, seed: int, questions: int = 4) -> "Table":
        """Half of all states are sure of their letter (probability about 0.95), as language models often are.

        At a decisive place the sure letter is the right one in two states of three: some mistakes are rare tokens.
        """
        rng = np.random.default_rng(seed)
        pairs = [rng.choice(HORIZON, 2, replace=False).tolist() for _ in range(questions)]
        decisive = tuple({int(p): int(rng.integers(0, 2)) for p in pair} for pair in pairs)
        logits = rng.normal(size=(questions, STATES, 3))
        logits[:, :, END] -= 2.0
        for question, state in product(range(questions), range(STATES)):
            letter = int(rng.integers(0, 2))
            wanted = decisive[question].get((state + 1).bit_length() - 1)
            if wanted is not None and rng.random() < 1 / 3:
                letter = wanted
            if rng.random() < 0.5:
                logits[question, state, letter] += 4.0
        return cls(logits=logits, decisive=decisive)

    @property
    def questions(self) -> int:
        """How many there are; each is drawn equally often."""
        return len(self.decisive)

    @cached_property
    def logprobs(self) -> Vector:
        """[questions, STATES, 3] nats."""
        shifted = self.logits - self.logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    def reward(self, question: int, letters: Sequence[int]) -> float:
        """1.0 where all decisive letters are there and right."""
        wanted = self.decisive[question]
        return float(all(p < len(letters) and letters[p] == x for p, x in wanted.items()))

    def logprob(self, question: int, state: int, token: int) -> float:
        """Nats; after the last letter only the end token is possible."""
        return float(self.logprobs[question, state, token]) if state < STATES else 0.0

    def responses(self, question: int) -> Iterator[Response]:
        """All of them; their probabilities add up to 1."""
        for length in range(HORIZON + 1):
            for letters in product((0, 1), repeat=length):
                tokens = (*letters, END)
                states = [0]
                for token in tokens:
                    states.append(2 * states[-1] + 1 + (0 if token == END else token))
                logprobs = [
                    self.logprob(question, s, t) for s, t in zip(states, tokens, strict=False)
                ]
                yield Response(
                    tokens=tokens,
                    states=tuple(states),
                    logprobs=tuple(logprobs),
                    probability=math.exp(sum(logprobs)),
                    reward=self.reward(question, letters),
                )

    @cached_property
    def values(self) -> list[dict[tuple[int, ...], float]]:
        """V by question and tokens so far, whole responses included, by enumeration."""
        found = []
        for question in range(self.questions):
            mass: dict[tuple[int, ...], float] = {}
            earned: dict[tuple[int, ...], float] = {}
            for response in self.responses(question):
                for end in range(len(response.tokens) + 1):
                    state = response.tokens[:end]
                    mass[state] = mass.get(state, 0.0) + response.probability
                    earned[state] = earned.get(state, 0.0) + response.probability * response.reward
            found.append({state: earned[state] / mass[state] for state in mass})
        return found

    def expected(self, token_advantages: "TokenAdvantages", rho: float | None = None) -> Vector:
        """[questions * STATES * 3] E[sum over tokens of A ∇logprob], the mean over questions, by enumeration.

        Args:
            token_advantages: gives each token of a response its advantage's expectation.
            rho: of the probability mask.
        """
        total = np.zeros_like(self.logits)
        for question in range(self.questions):
            for response in self.responses(question):
                advantages = token_advantages(question, response)
                for t, (state, token) in enumerate(
                    zip(response.states, response.tokens, strict=False)
                ):
                    masked = rho is not None and not response.logprobs[t] < math.log(rho)
                    if state < STATES and not masked:
                        slope = -np.exp(self.logprobs[question, state])
                        slope[token] += 1.0
                        total[question, state] += response.probability * advantages[t] * slope
        return total.ravel() / self.questions

    @cached_property
    def gradient(self) -> Vector:
        """[questions * STATES * 3] of the mean reward, by the logits: REINFORCE without a baseline, enumerated."""
        return self.expected(lambda _, response: [response.reward] * len(response.tokens))


TokenAdvantages = Callable[[int, Response], Sequence[float]]
"""(question, response) -> [T] advantages."""
