r"""The `math` reward: 1.0 where the response's last `\boxed{...}` equals the reference, else 0.0, by math-verify.

Equal means mathematically equal: `\frac12` is `0.5`, `(x+1)^2` is `x^2+2x+1`, `3,1,2` is `\{1,2,3\}`,
`x=5` is `5`. A response without a closed box has no answer.
Imported by worker processes only: sympy takes seconds to load.
"""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from server.rewards.base import refuse_unknown_options
from shared.errors import RequestError

# It warns of having no time limit of its own: the worker process has one, and two alarms would disturb each other.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX_FIRST = (LatexExtractionConfig(boxed_match_priority=0),)
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<brace>[{}])", re.DOTALL)
_DELIMITERS = re.compile(r"\A(?:\$+|\\[(\[])(?P<inner>.*?)(?:\$+|\\[)\]])\Z", re.DOTALL)


def math(response: str, reference: str, options: Mapping[str, Any]) -> float:
    r"""Grade one response by the rules above.

    Args:
        response: everything after the prompt.
        reference: plain LaTeX (`\frac{1}{2}`), or text whose last `\boxed{...}` is the answer.
        options: none but the service's `unfinished`.

    Raises:
        RequestError: the reference cannot be read, or an option is not known.
    """
    refuse_unknown_options(options)
    gold = _reference(reference)
    box = last_box(response)
    if box is None:
        return 0.0
    return float(verify(gold, _parse(box), timeout_seconds=None))


def last_box(text: str) -> str | None:
    r"""Content of the closed `\boxed{...}` (or `\fbox{...}`) that opens last; None without one. Linear time.

    >>> last_box(r"so \boxed{5}, no: \boxed{\frac{1}{2}}, or \boxed{3")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []  # where each open brace's box begins; None for a plain brace
    best: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"] is not None:
            opened.append(token.end())
        elif token["brace"] == "{":
            opened.append(None)
        elif token["brace"] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


@lru_cache(maxsize=256)
def _reference(reference: str) -> list[Any]:
    boxed = "\\boxed" in reference or "\\fbox" in reference
    answer = last_box(reference) if boxed else reference
    gold = _parse(answer) if answer is not None else []
    if not gold:
        raise RequestError(
            "reward.reference",
            f"math cannot read {reference[:80]!r}; give LaTeX such as '\\frac{{1}}{{2}}', or '\\boxed{{...}}'",
        )
    return gold


def _parse(latex: str) -> list[Any]:
    """What math-verify makes of a box: an expression, the text, or nothing."""
    bare = latex.strip()
    delimited = _DELIMITERS.match(bare)
    if delimited is not None and "$" not in delimited["inner"]:
        bare = delimited["inner"].strip()
    bare = bare.rstrip(".")  # "72." is no number to math-verify
    found: list[Any] = parse(
        f"\\boxed{{{bare}}}", extraction_config=_BOX_FIRST, parsing_timeout=None
    )
    return found
