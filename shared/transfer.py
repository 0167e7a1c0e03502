"""Weights straight from the trainer's memory into engines of the same cluster: what both sides say to each other.

A short cut beside the store, never instead of it: a server takes only what is announced, so that a trainer which
lost its lease reaches nobody, and whatever fails is fetched from the store.
"""

import math
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.manifest import Manifest


class TransferBackend(StrEnum):
    """What carries the bytes, by torch.distributed's name."""

    NCCL = "nccl"
    """Between GPUs."""
    GLOO = "gloo"
    """Between CPUs: slow, and for tests of everything but NCCL itself."""


class TransferGroup(BaseModel):
    """A group of one trainer and some engines; the trainer has rank 0 and listens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: TransferBackend
    address: str
    """Of the trainer, as servers reach it."""
    port: int = Field(ge=1, le=65535)
    rank: int = Field(ge=1)
    """Of the server."""
    size: int = Field(ge=2)
    """Ranks, the trainer's included."""
    timeout_s: float = Field(gt=0, le=600)
    """Bound of joining, and of each broadcast."""

    @model_validator(mode="after")
    def _rank_is_in_the_group(self) -> Self:
        if self.rank >= self.size:
            raise ValueError(f"rank {self.rank} is not below size {self.size}")
        return self


class TransferOffer(BaseModel):
    """A version that is about to be broadcast to the group: its tensors, in the order of its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Manifest
    """As announced: its digest is the head's `manifest_digest`. How its files are encoded does not matter here."""
    verify: bool = True
    """Hash the live tensors before the first token is sampled with them."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.manifest.tensors or self.manifest.seal().digest != self.manifest.digest:
            raise ValueError("manifest: it is empty, or its digest does not match its content")
        return self

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(math.prod(t.shape) * WIDTHS[t.dtype] for t in self.manifest.tensors)


TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16"}
"""Of the number formats that are published."""
WIDTHS = {"F32": 4, "BF16": 2}
