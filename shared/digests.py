"""Digests of tensors, files and weight sets: what makes a version one exact set of weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 20


def sha256(data: bytes | bytearray | memoryview) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of a mebibyte."""
    with path.open("rb") as stream:
        return sha256_of(iter(lambda: stream.read(_CHUNK), b""))


def sha256_of(pieces: Iterable[bytes]) -> str:
    """Hexadecimal SHA-256 of bytes that come in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def weights_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Digest of a whole set of weights, whatever the order of its tensors and files.

    Args:
        tensors: (name, dtype as safetensors writes it, shape, SHA-256 of the bytes) of each.
    """
    rows = sorted(
        f"{name} {dtype} {list(shape)} {digest}" for name, dtype, shape, digest in tensors
    )
    return sha256("\n".join(rows).encode())
