"""What an evaluation estimates from n graded samples of each question: pass@k, majority@k, means and errors.

Pure functions. Errors are over questions: samples of one question are not independent of one another.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

RIGHT = 1.0
"""A sample is right from this reward on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions."""

    mean: float
    standard_error: float
    """sqrt(s^2 / Q), s^2 the sample variance over Q questions; 0 for one question."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error.

    Args:
        values: [Q] one of each question, Q >= 1.

    >>> estimate([1.0, 0.0, 1.0, 0.0])
    Estimate(mean=0.5, standard_error=0.28867513459481287)
    """
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return Estimate(mean=mean, standard_error=math.sqrt(variance / len(values)))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of k samples is right, 1 - C(n-c, k) / C(n, k).

    Unbiased for k samples drawn anew; the share of the k-subsets of the n samples that hold a right one
    (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
        samples: n >= k.
        right: c of them.
        k: at least 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    assert 1 <= k <= samples, (k, samples)
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[Hashable | None], rewards: Sequence[float], k: int) -> float:
    """Reward of the answer that most of the first k samples give (self-consistency, arXiv 2203.11171).

    Samples without an answer do not vote; where none votes, 0. Of answers with equally many votes one is drawn by
    lot: the result is the mean of their rewards. An answer's reward is the mean over the samples that give it.

    Args:
        answers: [n] equal where they count as one answer; None for no answer.
        rewards: [n] of the samples.
        k: the first so many samples, at most n.

    >>> majority_at_k(["7", "8", None, "7"], [0.0, 1.0, 0.0, 0.0], 4)
    0.0
    >>> majority_at_k(["7", "8", None, "7"], [0.0, 1.0, 0.0, 0.0], 3)
    0.5
    """
    assert 1 <= k <= len(answers), (k, len(answers))
    votes: dict[Hashable, list[float]] = defaultdict(list)
    for answer, reward in zip(answers[:k], rewards[:k], strict=True):
        if answer is not None:
            votes[answer].append(reward)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(group) / most for group in votes.values() if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, linear between neighbours.

    Args:
        ordered: ascending, at least one.
        share: from 0 to 1.

    >>> quantile([1, 2, 3, 4], 0.5), quantile([1, 2, 3, 4], 1.0)
    (2.5, 4.0)
    """
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = math.ceil(place)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def default_ks(samples: int) -> list[int]:
    """1, 2, 4, … up to the number of samples, and that number.

    >>> default_ks(1), default_ks(6)
    ([1], [1, 2, 4, 6])
    """
    return [2**power for power in range(samples.bit_length()) if 2**power < samples] + [samples]
