"""The probability mask: only tokens that the policy was unsure of take part (arXiv 2505.23564, section 4)."""

import math
from typing import Any, TypeVar

from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", NDArray[Any], Tensor)


def participates(response: Array, behaviour_logprobs: Array, threshold: float | None) -> Array:
    """Response tokens whose behaviour probability is strictly below `threshold`; for numpy and torch alike.

    Compared as logarithms, so that a probability of exactly the threshold stays out in any precision.

    Args:
        response: [...] true at tokens that train.
        behaviour_logprobs: [...] log-probability (nats) under the distribution that sampled each token.
        threshold: rho, above 0 and at most 1; None takes every response token.

    Returns:
        [...] booleans.

    >>> import numpy as np
    >>> participates(np.array([True, True, False]), np.log([0.9, 0.5, 0.5]), 0.9).tolist()
    [False, True, False]
    """
    if threshold is None:
        return response
    return response & (behaviour_logprobs < math.log(threshold))
