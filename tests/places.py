"""Where a weight store is, seen from beside it: what a test reads, damages and deletes there without the store."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import pytest
from fake_s3 import FakeS3, credentials


class Place(Protocol):
    """Of one store."""

    url: str

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Make a file, or write over it."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file."""
        ...

    def names(self) -> set[str]:
        """Every file."""
        ...


@dataclass(frozen=True)
class Folder:
    """On this machine."""

    root: Path

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)

    def delete(self, name: str) -> None:
        (self.root / name).unlink()

    def names(self) -> set[str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)) for path in files}


@dataclass(frozen=True)
class Bucket:
    """In a fake S3."""

    fake: FakeS3
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/store"

    def _at(self, name: str) -> str:
        return f"{self.bucket}/store/{name}"

    def read(self, name: str) -> bytes:
        return self.fake.ask("GET", self._at(name))

    def write(self, name: str, data: bytes) -> None:
        self.fake.ask("PUT", self._at(name), data)

    def delete(self, name: str) -> None:
        self.read(name)
        self.fake.ask("DELETE", self._at(name))

    def names(self) -> set[str]:
        listed = ElementTree.fromstring(self.fake.ask("GET", f"{self.bucket}?list-type=2"))
        return {(key.text or "").removeprefix("store/") for key in listed.iter("{*}Key")}


def bucket(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new one, which this process has credentials for."""
    for name, value in credentials(fake.url).items():
        monkeypatch.setenv(name, value)
    return Bucket(fake, fake.bucket())


@pytest.fixture(params=["file", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A folder and a bucket, in turn."""
    if request.param == "file":
        yield Folder(tmp_path / "store")
    else:
        yield bucket(request.getfixturevalue("fake_s3"), monkeypatch)
