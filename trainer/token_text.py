"""The text that each token of a tree adds, for people to look at; nothing here is ever tokenised again."""

from collections.abc import Sequence

from shared.errors import ConfigError
from shared.pieces import BROKEN, Decode, Pieces
from shared.tree import Role
from trainer.tree_file import SavedTree

CONTEXT = 8
"""Tokens before a segment that its first token is decoded with."""


def token_texts(saved: SavedTree, decode: Decode | None) -> dict[int, list[str]]:
    """[T] text of each token, for the segments where it can be had.

    They are left out where they do not add up to the node's own text, which another tokenizer wrote. A segment
    that has no text at all shows its token ids.
    """
    found: dict[int, list[str]] = {}
    for node in saved.tree.nodes:
        if node.role is not Role.SEGMENT or node.id in saved.tokenless:
            continue
        if decode is not None:
            whole = saved.tree.response_token_ids(node.id)
            before = whole[: len(whole) - len(node.token_ids)]
            texts = pieces(decode, before, node.token_ids)
            if node.text is None or "".join(texts) == node.text:
                found[node.id] = texts
        elif node.text is None:
            found[node.id] = [f"{token} " for token in node.token_ids]
    return found


def pieces(decode: Decode, before: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    """[T] the text that each token adds to what stands before it; see `Pieces`.

    Args:
        decode: token ids into text.
        before: tokens of the response before these.
        token_ids: [T] the tokens.
    """
    context = before[-CONTEXT:]
    growing = Pieces(decode)
    growing.extend([*context, *token_ids])
    return growing.texts[len(context) :]


def load_decoder(name: str) -> Decode:
    """The decoder of a checkpoint's tokenizer.

    Args:
        name: a directory in Hugging Face format, or a hub id.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a broken file makes the two libraries raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"no tokenizer in {name}: {reason}") from None

    def decode(token_ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    return decode


_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_PICTURES |= {code: ord(BROKEN) for code in range(0x80, 0xA0)}


def printable(text: str, *, keep: str = "") -> str:
    """Control characters as pictures of themselves, so that no response steers a terminal; those in `keep` stay.

    >>> printable("a\\x1b[31mb\\n", keep="\\n")
    'a\u241b[31mb\\n'
    """
    return text.translate({code: new for code, new in _PICTURES.items() if chr(code) not in keep})
