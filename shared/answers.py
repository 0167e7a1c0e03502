r"""The answer in a response: the number after its last `####`, or its last `\boxed{...}`, outside its thinking.

Text alone, no mathematics: the servers' rewards grade what is found here, the trainer's majority votes count it.

A number is an optional sign (also the Unicode minus and the en dash), digits with or without thousands separators
(commas or single spaces between groups of three), decimals, a fraction `3/4`, a mixed `1 1/2`.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

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

_BOX = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<brace>[{}])", re.DOTALL)
_DELIMITERS = re.compile(r"\A(?:\$+|\\[(\[])(?P<inner>.*?)(?:\$+|\\[)\]])\Z", re.DOTALL)
_SAME = (
    (re.compile(r"\\left|\\right|\\[!,;: ]|[\s~]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\A\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}\Z"), r"\1"),
    (re.compile(r"\A[a-zA-Z]="), ""),
    (re.compile(r"\A(-?)\\frac\{(\d+)\}\{(\d+)\}\Z"), r"\1\2/\3"),
)
"""Ways to write one thing, undone in this order."""


def outside_thinking(response: str) -> str:
    """What a response says when it has done thinking.

    That is the text after its last `</think>`, which may have been opened in the prompt, and before a `<think>`
    that is never closed; the whole response where it has no such tags.

    >>> outside_thinking("<think>7 or 8?</think>It is 8. <think>Or")
    'It is 8. '
    """
    return response.rpartition("</think>")[2].partition("<think>")[0]


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


def last_box(text: str) -> str | None:
    r"""Content of the closed `\boxed{...}` (or `\fbox{...}`) that opens last; None without one. Linear time.

    >>> last_box(r"so \boxed{5}, no: \boxed{\frac{1}{2}}, or \boxed{3")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []  # where each open brace's box begins; None for a plain brace
    best: tuple[int, int] | None = None
    for token in _BOX.finditer(text):
        if token["box"] is not None:
            opened.append(token.end())
        elif token["brace"] == "{":
            opened.append(None)
        elif token["brace"] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def bare_box(content: str) -> str:
    r"""A box's content without one pair of `$...$` or `\(...\)` around it, and without what ends a sentence.

    >>> bare_box(" $72$. "), bare_box(r"72\\\\")
    ('72', '72')
    """
    bare = content.strip().rstrip(".")
    delimited = _DELIMITERS.match(bare)
    if delimited is not None and "$" not in delimited["inner"]:
        bare = delimited["inner"].strip()
    while bare.endswith("\\\\"):  # a line break
        bare = bare[:-2].rstrip()
    return bare.rstrip(".")


def number_answer(response: str) -> str | None:
    """What the `gsm8k` reward compares, for counting equal answers; None where a response has no answer.

    >>> number_answer("so #### $1,000.50 a month"), number_answer("#### 72 or 73")
    ('2001/2', None)
    """
    number = marked_number(outside_thinking(response))
    return None if number is None else str(number)


def box_answer(response: str) -> str | None:
    r"""The last box, written in one way, for counting equal answers; None where a response has none.

    Numbers are compared as numbers; of other answers only spelling is undone (spaces, `\left`, `\dfrac`, `\text{}`
    around the whole, `x=` before it, letter case), not mathematics: `x+1` and `1+x` are two answers.

    >>> [box_answer(rf"\boxed{{{text}}}") for text in (r"\dfrac12", "0.50", r"x = \frac{2}{4}", r"\sqrt {2}")]
    ['1/2', '1/2', '1/2', '\\sqrt{2}']
    """
    box = last_box(outside_thinking(response))
    if box is None:
        return None
    text = bare_box(box)
    for pattern, same in _SAME:
        text = pattern.sub(same, text)
    signless = text.lstrip("-")
    number = _NUMBER.fullmatch(signless)
    value = None if number is None else _value(number, "-" if text != signless else "")
    return text.casefold() or None if value is None else str(value)


ANSWERS: Mapping[str, Callable[[str], str | None]] = {"gsm8k": number_answer, "math": box_answer}
"""How the answer of a response is found, by the name of the reward that grades it."""
