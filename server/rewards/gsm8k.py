"""The `gsm8k` reward: 1.0 where the response's last `#### N` is the reference's number, else 0.0.

The answer is what follows the last marker (four or more `#`) that has a number behind it on the same line; what a
response thinks between `<think>` and `</think>` is no answer.

- Before the number may stand spaces, markdown emphasis, `$ € £ ¥`, `\\$`, `\\(`, `:` and `=`.
- The number: see `shared/answers.py`.
- After it anything without digits, such as a period, `%` or a unit, is ignored: `50%` is 50.
- A line that names two different numbers is no answer (`72 or 73`, `5 + 5 = 10`, `1e3`, `5:30`): hedging
  must not pay.

Numbers are compared exactly, as fractions: `7.0`, `7.` and `14/2` equal `7`; `33.33` is not `33.333`.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from server.rewards.base import refuse_unknown_options
from shared.answers import marked_number, outside_thinking
from shared.errors import RequestError


def gsm8k(response: str, reference: str, options: Mapping[str, Any]) -> float:
    """Grade one response by the rules above.

    Args:
        response: everything after the prompt.
        reference: a bare number (`72`, `$1,234.50`) or a GSM8K answer that ends in `#### 72`.
        options: none but the service's `unfinished`.

    Raises:
        RequestError: the reference has no number, or an option is not known.

    >>> gsm8k("48 / 2 = 24, and 48 + 24 = 72.\\n#### $72.00", "72", {})
    1.0
    """
    refuse_unknown_options(options)
    return float(marked_number(outside_thinking(response)) == _reference_number(reference))


def _reference_number(reference: str) -> Fraction:
    bare = reference.strip()
    number = marked_number(bare if "####" in bare or "\n" in bare else f"#### {bare}")
    if number is None:
        raise RequestError(
            "reward.reference",
            "gsm8k finds no single number in it; give one, or an answer that ends in '#### 72'",
        )
    return number
