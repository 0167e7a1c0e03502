r"""The `math` reward: 1.0 where the response's last `\boxed{...}` equals the reference, else 0.0, by math-verify.

Equal means mathematically equal: `\frac12` is `0.5`, `(x+1)^2` is `x^2+2x+1`, `3,1,2` is `\{1,2,3\}`,
`x=5` is `5`. A response without a closed box outside its thinking has no answer. docs/rewards.md has every policy.
Imported by worker processes only: sympy takes seconds to load.
"""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from server.rewards.base import refuse_unknown_options
from shared.answers import bare_box, last_box, outside_thinking
from shared.errors import RequestError

# It warns of having no time limit of its own: the worker process has one, and two alarms would disturb each other.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LONGEST = 1000
"""Characters of a box: no sensible answer is as long, and parsing takes more than linear time."""

_BOX_FIRST = (LatexExtractionConfig(boxed_match_priority=0),)
_THOUSANDS = re.compile(
    r"(?<![\d.,])\d{1,3}(?:(?:\\[,!: ]|[ \u00a0\u2009\u202f])\d{3})+(?![\d.,]*\d)"
)
_MIXED = re.compile(r"(?<![\d.,/}^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*(?:\{\s*\d\s*\}|\d)")


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
    written, gold = _reference(reference)
    box = last_box(outside_thinking(response))
    if box is None:
        return 0.0
    answer = bare_box(box)
    if answer == written:
        return 1.0
    if len(answer) > LONGEST:
        return 0.0
    found = _parse(answer)
    if _lost_a_number(answer, found):
        return 0.0
    return float(verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None))


@lru_cache(maxsize=256)
def _reference(reference: str) -> tuple[str, list[Any]]:
    boxed = "\\boxed" in reference or "\\fbox" in reference
    answer = last_box(reference) if boxed else reference
    bare = "" if answer is None else bare_box(answer)
    if len(bare) > LONGEST:
        raise RequestError(
            "reward.reference", f"it has {len(bare)} characters; math reads at most {LONGEST}"
        )
    gold = _parse(bare) if bare else []
    if not gold:
        raise RequestError(
            "reward.reference",
            "math cannot read it; give LaTeX such as '\\frac{1}{2}', or '\\boxed{...}'",
        )
    return bare, gold


def _parse(bare: str) -> list[Any]:
    """What math-verify makes of a box: an expression, the text that it read last, or nothing."""
    latex = _THOUSANDS.sub(_joined, bare.replace("~", " "))
    latex = _MIXED.sub(r"\1\\frac{\2}{\3}", latex)  # it reads 1 1/2 as 1 times 1
    found: list[Any] = parse(
        f"\\boxed{{{latex}}}", extraction_config=_BOX_FIRST, parsing_timeout=None
    )
    return found


def _joined(number: re.Match[str]) -> str:
    """Digits without what separates them: math-verify reads 1 000 as 1 times 0."""
    return re.sub(r"\D", "", number[0])


def _lost_a_number(bare: str, found: list[Any]) -> bool:
    r"""True if what was read leaves out digits: math-verify takes `72 \text{ or so } 73` for 72 and its unit."""
    text = found[-1] if found and isinstance(found[-1], str) else bare
    return _digits(text) < _digits(bare)


def _digits(latex: str) -> int:
    """Digits outside the powers of letters: a unit's power goes with the unit."""
    return sum(character.isdigit() for character in _UNIT_POWER.sub("", latex))
