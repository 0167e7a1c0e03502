"""Stop strings: a look at the last tokens' text, so that a row need not run on behind one."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

_MARGIN = 4
"""Tokens that may stand for no byte of text, such as special ones."""


class StopStrings:
    """Finds stop strings in decoded tails.

    Args:
        load: gives the tokenizer, or None where there is none and no stop string is ever found; called when the
            first stop string is asked for.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase | None]) -> None:
        self._load = load
        self._loaded = False
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def window(self, stops: Sequence[str]) -> int:
        """Tokens that surely hold the longest stop string: every token but a special one has a byte at least."""
        return max(len(stop.encode()) for stop in stops) + _MARGIN

    def found(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        """Is one of the stop strings in the text of these tokens?"""
        if not self._loaded:
            self._tokenizer, self._loaded = self._load(), True
        if self._tokenizer is None:
            return False
        text = self._tokenizer.decode(list(tokens))
        return any(stop in text for stop in stops)
