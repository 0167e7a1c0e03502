"""zstd with a bound on what comes out: a few bytes of it may claim gigabytes."""

import zstandard

from shared.errors import TreeError, TreeTooLargeError

LEVEL = 1
"""The fastest: what is sent is used once, and the numbers in it hardly shrink further."""
_PIECE = 256
"""Compressed bytes taken at once where the content's length is unknown: 11 MB of content at the very most."""
_WINDOW = 1 << 27
"""Most memory of a frame's window, bytes; zstd's own encoders stay below unless told otherwise."""


def compress(body: bytes) -> bytes:
    """One zstd frame that says how long its content is."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(body)


def content_size(body: bytes) -> int | None:
    """Length that a zstd frame claims for its content, bytes; None where it does not say.

    Raises:
        TreeError: it is no zstd frame.
    """
    try:
        size = zstandard.frame_content_size(body)
    except zstandard.ZstdError as error:
        raise TreeError(f"not a zstd frame: {error}") from None
    return None if size < 0 else size


def decompress(body: bytes, limit_bytes: int) -> bytes:
    """Content of one zstd frame, and nothing behind it.

    Args:
        body: the frame.
        limit_bytes: most bytes of content; hardly more is ever allocated.

    Raises:
        TreeError: it is damaged.
        TreeTooLargeError: it holds more.
    """
    size = content_size(body)
    if size is not None and size > limit_bytes:
        raise TreeTooLargeError(f"a zstd frame of {size} bytes, and {limit_bytes} are allowed")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        if size:
            return decompressor.decompress(body, allow_extra_data=False)
        return _by_pieces(decompressor, body, limit_bytes)
    except zstandard.ZstdError as error:
        raise TreeError(f"a damaged zstd frame: {error}") from None


def _by_pieces(decompressor: zstandard.ZstdDecompressor, body: bytes, limit_bytes: int) -> bytes:
    """Content of a frame that does not say how long it is, or says that it is empty."""
    frame = decompressor.decompressobj()
    content = bytearray()
    at = 0
    while at < len(body) and not frame.eof:
        content += frame.decompress(body[at : at + _PIECE])
        at += _PIECE
        if len(content) > limit_bytes:
            raise TreeTooLargeError(f"a zstd frame of more than the {limit_bytes} bytes allowed")
    if not frame.eof or frame.unused_data or at < len(body):
        raise TreeError("a zstd frame that is cut off, or followed by something")
    return bytes(content)
