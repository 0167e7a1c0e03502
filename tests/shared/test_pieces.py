"""Pieces against decoding the whole text: what a token adds is known when it comes, and nothing is lost."""

from pathlib import Path

import pytest

from server.tokens import Tokens
from shared.pieces import Pieces

TEXTS = [
    "",
    "Ana starts with 12. 12+5=17.\n\n#### 17",
    "é ü 你好, 世界 👩‍👩‍👧 𝛑²\n",
    " leading and trailing ",
]


@pytest.fixture(params=["tiny_math", "stories"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    """A byte-level tokenizer, and one of SentencePiece's kind, which drops a text's first space."""
    folder: Path = request.getfixturevalue(request.param)
    return Tokens.load(str(folder))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(tokens: Tokens, text: str) -> None:
    ids = [token for token in tokens.encode(text) if tokens.decode([token], special=True) != "<s>"]
    pieces = Pieces(tokens.decode)
    for at, token in enumerate(ids, start=1):
        pieces.extend([token])
        whole = tokens.decode(ids[:at])
        if "\N{REPLACEMENT CHARACTER}" not in whole:
            assert "".join(pieces.texts) == whole
    assert "".join(pieces.texts) == tokens.decode(ids)
    assert len(pieces.texts) == len(ids)
    at_once = Pieces(tokens.decode)
    at_once.extend(ids)
    assert at_once.texts == pieces.texts


def test_a_character_belongs_to_the_token_that_completes_it(tiny_math: Path) -> None:
    tokens = Tokens.load(str(tiny_math))
    pieces = Pieces(tokens.decode)
    pieces.extend(tokens.encode("a你b"))
    assert pieces.texts[0] == "a"
    assert pieces.texts[-2:] == ["你", "b"]
    assert set(pieces.texts[1:-2]) == {""}
