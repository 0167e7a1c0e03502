"""Weights straight from the trainer's memory into engines of the same cluster: what both sides say to each other.

A short cut beside the store, never instead of it: a server takes only what is announced, so that a trainer which lost
its lease reaches nobody, and whatever fails is fetched from the store.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    def _rank_is_in_the_group(self) -> "TransferGroup":
        if self.rank >= self.size:
            raise ValueError(f"rank {self.rank} is not below size {self.size}")
        return self


class TransferTensor(BaseModel):
    """One tensor on its way, in the order in which they are sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As in the checkpoint; a tied tensor once."""
    dtype: str = Field(pattern="^(float32|bfloat16)$")
    shape: tuple[int, ...]
    sha256: str
    """Of its bytes, as in the manifest."""


class TransferOffer(BaseModel):
    """A version that is about to be broadcast to the group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(ge=0)
    weights_digest: str
    """As announced."""
    tensors: tuple[TransferTensor, ...] = Field(min_length=1)
    """Every parameter once."""
    verify: bool = True
    """Hash the live tensors before the first token is sampled with them."""
