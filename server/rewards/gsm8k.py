"""The `gsm8k` reward: 1.0 where the response's last `#### N` is the reference's number, else 0.0.

The answer is what follows the last marker (four or more `#`) that has a number behind it on the same line.

- Before the number may stand spaces, markdown emphasis, `$ € £ ¥`, `\\$`, `\\(`, `:` and `=`.
- The number: an optional sign (also the Unicode minus and the en dash), digits with or without thousands
  separators (commas or single spaces between groups of three), decimals, a fraction `3/4`, a mixed `1 1/2`.
- After it anything without digits, such as a period, `%` or a unit, is ignored: `50%` is 50.
- A line that names two different numbers is no answer (`72 or 73`, `5 + 5 = 10`, `1e3`, `5:30`): hedging
  must not pay.

Numbers are compared exactly, as fractions: `7.0`, `7.` and `14/2` equal `7`; `33.33` is not `33.333`.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from server.rewards.base import refuse_unknown_options
from shared.errors import RequestError

_MARKER = re.compile(r"#{4,}")

# Possessive quantifiers (*+) keep a line of ten thousand spaces linear; [^\S\n] is a space of the same line.
_LEAD = re.compile(
    r"(?:[^\S\n]|[*_`$€£¥:=]|\\[$(\[])*+(?P<sign>[-+\u2212\u2013]?)(?:[^\S\n]|[$€£¥]|\\\$)*+(?=\.?\d)"
)
_NUMBER = re.compile(
    r"""
    (?: (?P<whole>\d+) \s++ (?=\d+ \s*+ / \s*+ \d) )?          # the 1 of 1 1/2
    (?P<upper> \d{1,3} (?: [, \u00a0\u2009\u202f] \d{3} )++ (?!\d) (?:\.\d*)?
             | \d+ (?:\.\d*)? | \.\d+ )
    (?: \s*+ / \s*+ (?P<lower> \d+ (?:\.\d+)? ) )?
    """,
    re.VERBOSE,
)
_SEPARATORS = re.compile("[, \u00a0\u2009\u202f]")
_LONGEST = 100  # characters of a number: reading one takes quadratic time
_MINUS = "-\u2212\u2013"  # hyphen, minus sign, en dash


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
    return float(marked_number(response) == _reference_number(reference))


def marked_number(text: str) -> Fraction | None:
    """The number behind the last `####` that has one; None without, or where its line names two."""
    for marker in reversed(list(_MARKER.finditer(text))):
        if _LEAD.match(text, marker.end()):
            return line_number(text[marker.end() :].split("\n", 1)[0])
    return None


def line_number(line: str) -> Fraction | None:
    """The one number that a line begins with; None where it does not, or names another one too.

    >>> line_number(" -$1,234.50 a month."), line_number("72 or 73")
    (Fraction(-2469, 2), None)
    """
    lead = _LEAD.match(line)
    if lead is None:
        return None
    first = _NUMBER.match(line, lead.end())
    assert first is not None, line
    answer = _value(first, lead["sign"])
    for other in _NUMBER.finditer(line, first.end()):
        sign = line[other.start() - 1]  # the first number lies before, so there is a character
        if _value(other, sign) != answer:
            return None
    return answer


def _value(number: re.Match[str], sign: str) -> Fraction | None:
    if len(number[0]) > _LONGEST:
        return None
    value = Fraction(Decimal(_SEPARATORS.sub("", number["upper"])))
    if number["lower"] is not None:
        lower = Fraction(Decimal(number["lower"]))
        if lower == 0:
            return None
        value /= lower
    if number["whole"] is not None:
        value += int(number["whole"])
    return -value if sign and sign in _MINUS else value


def _reference_number(reference: str) -> Fraction:
    bare = reference.strip()
    number = marked_number(bare if "####" in bare or "\n" in bare else f"#### {bare}")
    if number is None:
        raise RequestError(
            "reward.reference",
            f"gsm8k finds no single number in {reference[:80]!r}; give one, or an answer that ends in '#### 72'",
        )
    return number
