"""AdamW on float32 master weights, gradient clipping, and the learning-rate schedule.

Where a parameter is float32 it is its own master; where it is bf16 the optimizer holds a float32 copy and
writes the rounded result back after each step. A step of 1e-6 is below what bf16 can add to a weight of 1, so
without masters most steps would be lost.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.settings import Decay, OptimizerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step did."""

    gradient_norm: float
    """Global norm before clipping; NaN or infinite where the step was skipped for it."""
    learning_rate: float
    """The rate of this step."""
    skipped: bool
    """True if no weight moved."""


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Rate of step `step`, from 0: linear warm-up to the peak, then decay to the floor at `total_steps`.

    >>> settings = OptimizerSettings(learning_rate=8.0, warmup_steps=2, floor=0.25)
    >>> [learning_rate(settings, step, 6) for step in range(8)]
    [4.0, 8.0, 8.0, 6.5, 5.0, 3.5, 2.0, 2.0]
    """
    warm = settings.warmup_steps
    if warm is None:
        warm = math.ceil(settings.warmup_ratio * total_steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, total_steps - warm))
    left = {
        Decay.CONSTANT: 1.0,
        Decay.LINEAR: 1 - done,
        Decay.COSINE: (1 + math.cos(math.pi * done)) / 2,
    }[settings.decay]
    return settings.learning_rate * (settings.floor + (1 - settings.floor) * left)


class PolicyOptimizer:
    """Steps a model's parameters in place.

    Gradients are summed in float32 over the micro-batches of a step, whatever the model's precision. Call
    `backward` on each micro-batch's loss, then `step` or `skip` once.

    Args:
        model: its parameters that require gradients are trained.
        settings: see `OptimizerSettings`.
        total_steps: where the schedule ends; skipped steps count.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, *, total_steps: int) -> None:
        self.settings = settings
        self.total_steps = total_steps
        self.steps = 0
        """Steps so far, skipped ones included: the schedule's clock."""
        self.skipped = 0
        """Steps so far in which no weight moved."""
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._masters = [
            p if p.dtype == torch.float32 else p.detach().to(torch.float32, copy=True)
            for p in self._parameters
        ]
        for parameter, master in self._copies():
            hook = _move_gradient_to(master)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's own
        self._adam = torch.optim.AdamW(
            self._masters,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )

    def step(self) -> StepReport:
        """Clip, step and clear the gradients; a gradient that is not finite skips the step."""
        gradients = [m.grad for m in self._masters if m.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm.item()):
            return self.skip(gradient_norm=norm.item())
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._masters, self.settings.clip_norm, norm)
        rate = learning_rate(self.settings, self.steps, self.total_steps)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._write_back()
        self._finish()
        return StepReport(gradient_norm=norm.item(), learning_rate=rate, skipped=False)

    def skip(self, gradient_norm: float = 0.0) -> StepReport:
        """Drop the gradients and move nothing, momentum included; the schedule goes on."""
        rate = learning_rate(self.settings, self.steps, self.total_steps)
        self.skipped += 1
        self._finish()
        return StepReport(gradient_norm=gradient_norm, learning_rate=rate, skipped=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's own weights: moments, counters, and masters where they are copies.

        Tensors and plain values alone, so that `torch.load` reads it with `weights_only`.
        """
        return {
            "adam": self._adam.state_dict(),
            "masters": [master for _, master in self._copies()],
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off, bit for bit, the model's weights being the same again.

        Masters that are copies are also written to the model.

        Raises:
            ValueError: the state is of a model of another shape or precision.
        """
        copies, saved = [master for _, master in self._copies()], state["masters"]
        if [m.shape for m in copies] != [m.shape for m in saved]:
            raise ValueError("the optimizer state is of a model of another shape or precision")
        self._adam.load_state_dict(state["adam"])
        for master, value in zip(copies, saved, strict=True):
            master.copy_(value)
        self._write_back()
        self.steps, self.skipped = state["steps"], state["skipped"]

    def _copies(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        pairs = zip(self._parameters, self._masters, strict=True)
        return ((parameter, master) for parameter, master in pairs if master is not parameter)

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in self._copies():
            parameter.copy_(master)

    def _finish(self) -> None:
        self.steps += 1
        self._adam.zero_grad(set_to_none=True)


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move
