"""A new set of weights into a model: all of it or nothing.

Everything that can be wrong with the files is found while the old weights still serve: the tensors are read into
memory and checked first, so that writing them only copies.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import WeightsError

Staged = list[tuple[nn.Parameter, Tensor]]
"""Every parameter once, with its new values."""


def stage(model: nn.Module, files: Iterable[Path]) -> Staged:
    """Read and check every tensor; touches no weights, so any thread may call it.

    Tied parameters go by any of their names, once.

    Raises:
        WeightsError: a file cannot be read, or a tensor is missing, unknown, given twice, or has another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    staged: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for path in files:
        for name, tensor in _read(path):
            parameter = parameters.get(name)
            if parameter is None:
                raise WeightsError(f"{path.name}: the model has no parameter {name}")
            if tensor.shape != parameter.shape:
                raise WeightsError(
                    f"{path.name}: {name} has shape {list(tensor.shape)}, the model's is {list(parameter.shape)}"
                )
            if id(parameter) in staged:
                raise WeightsError(
                    f"{path.name}: {name} is given twice, under this name or a tied one"
                )
            staged[id(parameter)] = (parameter, tensor)
    missing = [name for name, p in model.named_parameters() if id(p) not in staged]
    if missing:
        raise WeightsError(f"{len(missing)} parameters are missing, {missing[0]} first")
    return list(staged.values())


def _read(path: Path) -> Iterable[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no dict
                # A copy: the file is mapped, and a page that fails must fail now and not half-way through `write`.
                yield name, file.get_tensor(name).clone()
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: {error}") from error


@torch.inference_mode()
def write(staged: Staged) -> None:
    """Copy the new values into the parameters, cast to their number format."""
    for parameter, tensor in staged:
        parameter.copy_(tensor)
