"""Files of weights: full sets and patches, checked against a model's tensors before any of these is touched.

A model is known here by its *shapes*, name -> shape of every checkpoint tensor once, and by its *aliases*, tied
name -> the name of the tensor that it shares.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]
Aliases = Mapping[str, str]

INDICES, VALUES = ".indices", ".values"


@contextlib.contextmanager
def naming(version: int) -> Iterator[None]:
    """Name the version in what is wrong with its weights."""
    try:
        yield
    except WeightsError as error:
        raise type(error)(f"version {version}: {error}") from error


@contextlib.contextmanager
def open_tensors(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Every tensor of some safetensors files, name -> the open file that has it; all are open at once.

    Raises:
        WeightsError: a file cannot be read, or has a tensor that another one has too.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in files:
            with _readable(file):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():  # noqa: SIM118 - not a mapping, it cannot be iterated
                    if name in found:
                        raise WeightsError(f"{name} appears twice, in {file.name} the second time")
                    found[name] = opened
        yield found


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read {file}: {error}") from error


def match_full(shapes: Shapes, aliases: Aliases, found: Mapping[str, Any]) -> dict[str, str]:
    """Check a full set; returns the model's name -> the files' name of each tensor.

    Tied tensors go by any of their names; where two are given they must be equal.

    Raises:
        WeightsError: a tensor is missing, unknown, has another shape, or breaks a tie.
    """
    given: dict[str, str] = {}
    for name, file in found.items():
        owner = _owner(shapes, aliases, name)
        shape = tuple(file.get_slice(name).get_shape())
        if shape != shapes[owner]:
            raise WeightsError(
                f"{name} has shape {list(shape)}, the model's is {list(shapes[owner])}"
            )
        other = given.setdefault(owner, name)
        if other != name and not torch.equal(file.get_tensor(name), found[other].get_tensor(other)):
            raise _broken_tie(aliases, name, other)
    missing = [name for name in shapes if name not in given]
    if missing:
        others = f", and {len(missing) - 1} others" if missing[1:] else ""
        raise WeightsError(f"{missing[0]} is missing{others}")
    return given


@dataclass(frozen=True, slots=True)
class Patch:
    """What changes in one tensor."""

    name: str
    """The model's."""
    indices: Tensor
    """[n] int64, ascending places in the flattened tensor."""
    values: Tensor
    """[n] the new values, in the files' number format."""


def read_patches(shapes: Shapes, aliases: Aliases, found: Mapping[str, Any]) -> Iterator[Patch]:
    """Read and check the changes of a patch, one tensor at a time. All names are checked before the first is read.

    Raises:
        WeightsError: a part is missing, unknown, of another length or number format, or points outside its tensor.
    """
    names: dict[str, str] = {}
    ties: list[tuple[str, str]] = []
    for name in sorted({_base(part) for part in found}):
        for part in (name + INDICES, name + VALUES):
            if part not in found:
                raise WeightsError(f"{part} is missing")
        owner = _owner(shapes, aliases, name)
        if names.setdefault(owner, name) != name:
            ties.append((name, names[owner]))
    for name, other in ties:
        mine, theirs = _read(found, name), _read(found, other)
        if not all(map(torch.equal, mine, theirs)):
            raise _broken_tie(aliases, name, other)
    for owner, name in names.items():
        yield _checked(owner, name, shapes[owner], *_read(found, name))


def _base(part: str) -> str:
    for suffix in (INDICES, VALUES):
        if part.endswith(suffix):
            return part.removesuffix(suffix)
    raise WeightsError(
        f"{part} is no part of a patch: its name ends in neither {INDICES} nor {VALUES}"
    )


def _read(found: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    indices, values = name + INDICES, name + VALUES
    return found[indices].get_tensor(indices), found[values].get_tensor(values)


def _checked(
    owner: str, name: str, shape: tuple[int, ...], indices: Tensor, values: Tensor
) -> Patch:
    if indices.dtype not in (torch.int32, torch.int64) or not values.is_floating_point():
        raise WeightsError(
            f"{name}: indices of {indices.dtype} and values of {values.dtype}; "
            "they are int32 or int64, and floating-point numbers"
        )
    if indices.dim() != 1 or indices.shape != values.shape:
        raise WeightsError(
            f"{name}: indices of shape {list(indices.shape)} and values of {list(values.shape)}; "
            "they are two lists of one length"
        )
    if len(indices):
        size = torch.Size(shape).numel()
        first, last = int(indices[0]), int(indices[-1])
        if not bool((indices[1:] > indices[:-1]).all()):
            raise WeightsError(f"{name}: its indices are not in ascending order")
        if first < 0 or last >= size:
            raise WeightsError(
                f"{name}: indices from {first} to {last}, the tensor has {size} places"
            )
    # A copy: the file is mapped, and a page that fails must fail now and not while weights are written.
    return Patch(owner, indices.to(torch.int64, copy=True), values.clone())


def _owner(shapes: Shapes, aliases: Aliases, name: str) -> str:
    owner = aliases.get(name, name)
    if owner not in shapes:
        raise WeightsError(f"{name} is not a tensor of this model")
    return owner


def _broken_tie(aliases: Aliases, name: str, other: str) -> WeightsError:
    alias, owner = (name, other) if name in aliases else (other, name)
    return WeightsError(f"{alias} differs from {owner}, which this model ties it to")
