"""New weights, ready in memory, and writing them: all or nothing.

Everything slow or fallible happens while the old weights still sample: files are read and checked, numbers cast,
and what is about to be overwritten is kept. Writing then only moves memory, and can be undone.

A *slot* is the part of a model's memory that holds one checkpoint tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from server.engines.memory import spare_bytes
from server.engines.weight_files import Aliases, Patch, match_full, open_tensors, read_patches
from shared.digests import sha256
from shared.errors import WeightsError

Slots = Mapping[str, Tensor]
"""Checkpoint name -> slot, every parameter once."""

PIECE = 1 << 19
"""Elements that are exchanged at once: they fit a processor's cache."""


class TornError(RuntimeError):
    """Writing failed half-way and could not be undone: the model holds a mixture of two versions."""


class Change(Protocol):
    """New values of one slot."""

    @property
    def nbytes(self) -> int:
        """About how many bytes `apply` moves."""
        ...

    def apply(self) -> None:
        """Write the new values."""
        ...

    def undo(self) -> None:
        """Write the old values back, whether all, some or none of the new ones were written."""
        ...


@dataclass(frozen=True, slots=True)
class Scatter:
    """A few elements of a slot: `window[positions] = new`."""

    window: Tensor
    """The slot's memory, flat."""
    positions: Tensor
    new: Tensor
    old: Tensor

    @property
    def nbytes(self) -> int:
        """Of places and values."""
        return self.positions.nbytes + self.new.nbytes

    def apply(self) -> None:
        """Write the new values."""
        self.window.index_copy_(0, self.positions, self.new)

    def undo(self) -> None:
        """Write the old values back."""
        self.window.index_copy_(0, self.positions, self.old)


@dataclass(slots=True)
class Exchange:
    """A whole slot, exchanged piece by piece with a buffer, which then has the old values: no third copy."""

    slot: Tensor
    buffer: Tensor
    exchanged: int = 0
    """Pieces, so far."""

    @property
    def nbytes(self) -> int:
        """Of the slot."""
        return self.buffer.nbytes

    def apply(self) -> None:
        """Write the new values."""
        for mine, theirs in self._pieces():
            _exchange(mine, theirs)
            self.exchanged += 1

    def undo(self) -> None:
        """Write the old values back."""
        for mine, theirs in self._pieces()[: self.exchanged]:
            _exchange(mine, theirs)
        self.exchanged = 0

    def _pieces(self) -> list[tuple[Tensor, Tensor]]:
        mine, theirs = self.slot, self.buffer
        if mine.is_contiguous():
            mine, theirs = mine.view(-1), theirs.view(-1)
        rows = max(1, PIECE * len(mine) // max(mine.numel(), 1)) if mine.dim() else 1
        if not mine.dim():
            return [(mine, theirs)]
        return list(zip(torch.split(mine, rows), torch.split(theirs, rows), strict=True))


@dataclass(frozen=True, slots=True)
class Overwrite:
    """A whole slot from a mapped file, where memory has no room for a second set: cannot be undone."""

    slot: Tensor
    new: Tensor

    @property
    def nbytes(self) -> int:
        """Of the file's tensor."""
        return self.new.nbytes

    def apply(self) -> None:
        """Write the new values."""
        self.slot.copy_(self.new)

    def undo(self) -> None:
        """Fails."""
        raise TornError("the old values were not kept: memory had no room for them")


def _exchange(mine: Tensor, theirs: Tensor) -> None:
    old = mine.clone()
    mine.copy_(theirs)
    theirs.copy_(old)


def _nothing() -> None:
    pass


@torch.inference_mode()
def stage_full(
    slots: Slots, aliases: Aliases, files: Iterable[Path], step: Callable[[], None] = _nothing
) -> list[Change]:
    """Read and check a full set; touches no weights, so any thread may call it.

    The tensors come into memory where they take at most half of what is free, and stay in their mapped files else.

    Args:
        slots: of the model.
        aliases: its tied names.
        files: safetensors shards.
        step: called after each tensor: a sign of progress.

    Raises:
        WeightsError: a file cannot be read, or a tensor is missing, unknown, has another shape, or breaks a tie.
    """
    shapes = {name: tuple(slot.shape) for name, slot in slots.items()}
    changes: list[Change] = []
    fits = sum(slot.nbytes for slot in slots.values()) <= spare_bytes() // 2
    with open_tensors(files) as found:
        for name, given in match_full(shapes, aliases, found).items():
            slot, tensor = slots[name], found[given].get_tensor(given)
            if fits:
                buffer = torch.empty(slot.shape, dtype=slot.dtype)
                changes.append(Exchange(slot, buffer.copy_(tensor)))
            else:
                changes.append(Overwrite(slot, tensor))
            step()
    return changes


@torch.inference_mode()
def stage_patch(
    slots: Slots, aliases: Aliases, files: Iterable[Path], step: Callable[[], None] = _nothing
) -> list[Change]:
    """Read and check a patch, and gather what it will overwrite; see `stage_full`.

    Of memory it takes no more than a second copy of the tensors that change.

    Raises:
        WeightsError: a file cannot be read, or its changes do not fit the model.
    """
    shapes = {name: tuple(slot.shape) for name, slot in slots.items()}
    changes: list[Change] = []
    with open_tensors(files) as found:
        for patch in read_patches(shapes, aliases, found):
            changes.append(_change(slots[patch.name], patch))
            step()
    return changes


def _change(slot: Tensor, patch: Patch) -> Change:
    values = patch.values.to(slot.dtype)
    if patch.indices.nbytes + 2 * values.nbytes > slot.nbytes:
        # So many elements that all of them take less memory, and less time to write.
        buffer = torch.empty(slot.shape, dtype=slot.dtype).copy_(slot)
        buffer.view(-1).index_copy_(0, patch.indices, values)
        return Exchange(slot, buffer)
    window, places = flat(slot), positions(slot, patch.indices).to(slot.device)
    return Scatter(window, places, values.to(slot.device), window.index_select(0, places))


def flat(slot: Tensor) -> Tensor:
    """A flat view of the memory that a slot lies in, gaps included where it has some."""
    if slot.is_contiguous():
        return slot.view(-1)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(slot.shape, slot.stride(), strict=True))
    return slot.as_strided((extent,), (1,))


def positions(slot: Tensor, indices: Tensor) -> Tensor:
    """Where the elements of the flattened tensor lie in `flat(slot)`."""
    if slot.is_contiguous():
        return indices
    places = torch.zeros_like(indices)
    for along, stride in zip(torch.unravel_index(indices, slot.shape), slot.stride(), strict=True):
        places += along * stride
    return places


@torch.inference_mode()
def write(changes: Sequence[Change]) -> None:
    """Apply every change, or none.

    Raises:
        WeightsError: one failed; the old values are back.
        TornError: one failed, and the old values cannot be had again.
    """
    begun: list[Change] = []
    try:
        for change in changes:
            begun.append(change)
            change.apply()
    except Exception as error:  # whatever a change raises, the old weights must serve on
        try:
            for change in reversed(begun):
                change.undo()
        except Exception as second:  # likewise; now nothing may be served any more
            raise TornError(f"{error!r}, and the old weights are lost: {second}") from error
        raise WeightsError(f"writing failed and was undone: {error!r}") from error


@torch.inference_mode()
def live_digests(
    slots: Slots, dtype: torch.dtype, step: Callable[[], None] = _nothing
) -> dict[str, str]:
    """SHA-256 of every slot's bytes in a number format, little endian and row major, by checkpoint name."""
    found: dict[str, str] = {}
    for name, slot in slots.items():
        raw = slot.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
        found[name] = sha256(raw.numpy().data)
        step()
    return found
