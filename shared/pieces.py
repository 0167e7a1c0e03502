"""The text that each token adds to a response."""

from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids into text, special tokens left out."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What stands in decoded text for bytes that are no character, or not yet."""


class Pieces:
    """The text that each token of a growing response adds, decided by the tokens up to it alone.

    A token that ends within a character adds nothing; the one that completes it adds all of it.

    Args:
        decode: of the model's tokenizer.

    >>> letters = dict(enumerate("abc"))
    >>> pieces = Pieces(lambda ids: "".join(letters.get(i, "") for i in ids))
    >>> pieces.extend([1, 9, 2])
    >>> pieces.texts
    ['b', '', 'c']
    """

    def __init__(self, decode: Decode) -> None:
        self.texts: list[str] = []
        """[T] of the tokens so far."""
        self._decode = decode
        # Tokens of the last whole piece, and those since. Text is decoded from the former on: enough for
        # tokenizers that treat the first token of a text in another way.
        self._last: list[int] = []
        self._open: list[int] = []

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens."""
        for token in token_ids:
            self._open.append(token)
            known = self._decode(self._last)
            text = self._decode([*self._last, *self._open])
            if text.endswith(BROKEN) or len(text) <= len(known):
                self.texts.append("")
            else:
                self.texts.append(text[len(known) :])
                self._last, self._open = self._open, []
