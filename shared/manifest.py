"""The manifest of a weight version: what its bytes are and how to know that they are right (DESIGN.md section 6).

Written last, after every file it names is durable: a version without a manifest does not exist.
"""

import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.digests import sha256, weights_digest
from shared.errors import WeightsError

FORMAT = 2
"""Of manifests; 1 knew no shortcuts and no digest of a delta's base."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Encoding(StrEnum):
    """How a version's files hold its tensors."""

    FULL = "full"
    """safetensors shards with every tensor: an anchor."""
    DELTA = "delta"
    """Changed elements against one base version; see `delta`."""


class TensorEntry(BaseModel):
    """One tensor of the resulting weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name in the Hugging Face checkpoint; a tied tensor appears once."""
    dtype: str
    """As safetensors writes it: `F32`, `BF16`."""
    shape: tuple[int, ...]
    sha256: str
    """Of the resulting tensor's bytes, little endian, row major."""


class FileEntry(BaseModel):
    """One file of the version's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """A plain file name: a manifest can never point outside its directory."""
    size: int
    """Bytes."""
    sha256: str


class DeltaEntry(BaseModel):
    """What turns one base version into this one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_version: int = Field(ge=0)
    base_digest: str
    """Digest of the base's weights: two bases of one number are never confused."""
    files: tuple[FileEntry, ...]


class Manifest(BaseModel):
    """Everything a server must know to fetch and verify one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    run: str
    version: int = Field(ge=0)
    base_version: int | None = None
    """The version that a delta starts from; None for an anchor."""
    base_digest: str = ""
    """Digest of the base's weights; empty for an anchor."""
    encoding: Encoding = Encoding.FULL
    dtype: str
    """`float32` or `bfloat16`, of the published tensors."""
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    """Of an anchor its shards; of a delta its changed elements."""
    shortcut: DeltaEntry | None = None
    """Of an anchor: the same version as a delta, for servers that hold its base and need no second full copy."""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    digest: str = ""
    """SHA-256 of this manifest with `digest` empty; see `seal`."""

    @model_validator(mode="after")
    def _base_fits_encoding(self) -> Self:
        is_delta = self.encoding is Encoding.DELTA
        if is_delta != (self.base_version is not None) or is_delta != bool(self.base_digest):
            raise ValueError(
                "a delta names its base_version and base_digest, an anchor has neither"
            )
        if is_delta and self.shortcut is not None:
            raise ValueError("a delta has no shortcut")
        step = self.delta
        if step is not None and step.base_version >= self.version:
            raise ValueError(f"base_version {step.base_version} is not below the version")
        return self

    @property
    def delta(self) -> DeltaEntry | None:
        """How to come here from the version before: a delta itself, an anchor by its shortcut, or None."""
        if self.base_version is None:
            return self.shortcut
        return DeltaEntry(
            base_version=self.base_version, base_digest=self.base_digest, files=self.files
        )

    @property
    def is_anchor(self) -> bool:
        """Does it stand by itself?"""
        return self.encoding is Encoding.FULL

    @property
    def weights_digest(self) -> str:
        """Digest of the resulting weights: equal for equal bytes, whatever the version or encoding."""
        return weights_digest((t.name, t.dtype, t.shape, t.sha256) for t in self.tensors)

    def seal(self) -> Self:
        """This manifest with its digest filled in."""
        return self.model_copy(update={"digest": self._own_digest()})

    def _own_digest(self) -> str:
        return sha256(self.model_copy(update={"digest": ""}).model_dump_json().encode())

    def encode(self) -> bytes:
        """The bytes that the store keeps."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def decode(cls, data: bytes, *, run: str, version: int) -> Self:
        """Read a stored manifest and check that it is whole and that it is the one asked for.

        Raises:
            WeightsError: damaged, or of another run or version.
        """
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise WeightsError(f"manifest of version {version}: {where}: {first['msg']}") from None
        if manifest.format != FORMAT:
            raise WeightsError(
                f"manifest of version {version} has format {manifest.format}, which this Spoke does not read "
                f"(it reads {FORMAT}); publish the weights again under a new run name"
            )
        if manifest._own_digest() != manifest.digest:
            raise WeightsError(
                f"manifest of version {version}: its digest does not match its content"
            )
        if (manifest.run, manifest.version) != (run, version):
            raise WeightsError(
                f"manifest of {run} version {version} names {manifest.run} version {manifest.version}"
            )
        return manifest


def check_run_name(run: str) -> str:
    """Return `run` when it can name a folder and a Redis key.

    Raises:
        ValueError: it cannot.
    """
    if not RUN_NAME.fullmatch(run):
        raise ValueError(
            f"run name {run!r}: use letters, digits, '.', '_' and '-', at most 100, "
            "starting with a letter or digit"
        )
    return run
