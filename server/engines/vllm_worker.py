"""What runs inside vLLM's worker: new weights go into the model that is being served.

vLLM mixes `WeightLoader` into its worker class (`worker_extension_cls`), and `collective_rpc` calls its methods by
name between two engine steps. An update is written into slots (`vllm_slots`). That they are right is proved at the
start: every one must equal the checkpoint's tensor. A model for which they are not goes through vLLM's own loader,
which must pass the same proof.

What takes long runs as a job in a thread of its own, while the engine goes on sampling: reading an update into
memory, and hashing the tensors.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.model_executor.model_loader import get_model_loader

from server.engines.staging import Change, live_digests, stage_full, stage_patch, write
from server.engines.vllm_slots import Loadable, holds, reloads, restore, slots, snapshot
from server.engines.weight_files import match_full, open_tensors
from shared.errors import WeightsError

# vLLM's CPU build would pack each matrix into an opaque oneDNN handle and leave an empty parameter behind, into
# which nothing can be copied. This module is imported before the model is loaded; `spoke_open` checks the effect.
ops._supports_onednn = False


class Job:
    """Work in a thread of its own.

    Args:
        work: gets a function to call after each part of it: a sign of progress.
    """

    def __init__(self, work: Callable[[Callable[[], None]], Any]) -> None:
        self.steps = 0
        self.result: Any = None
        self.fault: str | None = None
        """Why there is no result."""
        self._work = work
        self._thread = threading.Thread(target=self._run, name="spoke-weights", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Has it ended?"""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.result = self._work(self._step)
        except WeightsError as error:
            self.fault = str(error)
        except BaseException as error:  # edge of the thread: nobody else would see it
            self.fault = repr(error)

    def _step(self) -> None:
        self.steps += 1


class WeightLoader:
    """Methods that `VllmEngine` calls by `collective_rpc`; `self` is vLLM's worker."""

    _spoke_slots: dict[str, Tensor]
    _spoke_aliases: dict[str, str]
    _spoke_shapes: dict[str, tuple[int, ...]]
    _spoke_path: str
    _spoke_job: Job | None = None
    _spoke_staged: list[Change]
    _spoke_files: list[Path]

    # Of vLLM's worker, which this is mixed into.
    get_model: Any
    model_config: Any
    load_config: Any

    def spoke_open(self) -> str | None:
        """Find the slots and prove them against the checkpoint; returns why this model cannot be served, or None.

        A model that fails the proof both by slots and by vLLM's loader serves, but takes no weights.
        """
        model: Loadable = self.get_model()
        empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
        if empty:
            return (
                f"it packed {len(empty)} parameters, {empty[0]} first, which then take no weights"
            )
        self._spoke_slots, self._spoke_aliases = slots(model)
        loader: Any = get_model_loader(self.load_config)
        self._spoke_shapes, wrong = {}, set()
        for name, tensor in loader.get_all_weights(self.model_config, model):
            self._spoke_shapes[name] = tuple(tensor.shape)
            if name not in self._spoke_slots or not holds(self._spoke_slots[name], tensor):
                wrong.add(name)
        for alias, name in self._spoke_aliases.items():
            if name in self._spoke_shapes:
                self._spoke_shapes.pop(alias, None)
        if (
            self._spoke_slots.keys() == self._spoke_shapes.keys()
            and wrong <= self._spoke_aliases.keys()
        ):
            self._spoke_path = "slots"
        elif reloads(model, loader.get_all_weights(self.model_config, model)):
            self._spoke_path = "loader"
        else:
            self._spoke_path = "none"
        return None

    def spoke_path(self) -> str:
        """How new weights get in: `slots`, `loader` (vLLM's own), or `none`. Answers between two engine steps."""
        return self._spoke_path

    def spoke_clock(self) -> float:
        """The monotonic clock, which all processes of a machine share."""
        return time.monotonic()

    def spoke_stage(self, files: list[str], is_patch: bool) -> bool:
        """Begin to read and check an update, touching no weights; the result is the bytes to be written."""
        self._spoke_staged, self._spoke_files = [], [Path(file) for file in files]
        by_slots = stage_patch if is_patch else stage_full

        def work(step: Callable[[], None]) -> int:
            if self._spoke_path == "loader":
                return self._checked()
            changes = by_slots(self._spoke_slots, self._spoke_aliases, self._spoke_files, step)
            self._spoke_staged = changes
            return sum(change.nbytes for change in changes)

        return self._begin(work)

    def spoke_digests(self, dtype: str) -> bool:
        """Begin to hash every tensor in a number format; its result is name -> SHA-256."""
        form = getattr(torch, dtype)
        return self._begin(lambda step: live_digests(self._spoke_slots, form, step))

    def spoke_progress(self) -> tuple[int, bool, str | None, Any]:
        """Of the job: parts done so far, whether it has ended, what went wrong, its result."""
        job = self._spoke_job
        assert job is not None, "asked after a job was begun"
        return (job.steps, job.done, job.fault, job.result if job.done else None)

    def spoke_write(self) -> tuple[float, str | None]:
        """Write what was staged: all of it, or nothing.

        Returns:
            seconds that it took; why the old weights are back, or None.

        Raises:
            TornError: writing failed and could not be undone.
        """
        began = time.perf_counter()
        staged, self._spoke_staged = self._spoke_staged, []
        try:
            if self._spoke_path == "slots":
                write(staged)
            else:
                self._load()
        except WeightsError as error:
            return time.perf_counter() - began, str(error)
        return time.perf_counter() - began, None

    def _begin(self, work: Callable[[Callable[[], None]], Any]) -> bool:
        """Start a job; False where the last one, which nobody waits for any more, still runs."""
        if self._spoke_job is not None and not self._spoke_job.done:
            return False
        self._spoke_job = Job(work)
        return True

    def _checked(self) -> int:
        """Check a full set for vLLM's loader; returns its bytes."""
        with open_tensors(self._spoke_files) as found:
            match_full(self._spoke_shapes, self._spoke_aliases, found)
        return sum(file.stat().st_size for file in self._spoke_files)

    def _load(self) -> None:
        """Write by vLLM's loader, which may raise half-way."""
        model: Loadable = self.get_model()
        before = snapshot(model)
        try:
            model.load_weights(self._fresh())
        except (
            Exception
        ) as error:  # whatever a model's loader raises, the old weights must serve on
            restore(model, before)
            raise WeightsError(f"vLLM's loader failed and was undone: {error!r}") from error

    def _fresh(self) -> Iterator[tuple[str, Tensor]]:
        with open_tensors(self._spoke_files) as found:
            given = match_full(self._spoke_shapes, self._spoke_aliases, found)
            for name, source in given.items():
                yield name, found[source].get_tensor(source)
