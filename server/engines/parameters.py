"""A Hugging Face model's parameters by checkpoint name."""

from torch import Tensor, nn


def slots(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Where each parameter lies in memory, and which names are tied to another's parameter.

    Returns:
        name -> the parameter's memory, every parameter once; tied name -> name of the parameter that it shares.
    """
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    aliases = {name: owners[id(p)] for name, p in everything if owners[id(p)] != name}
    return {name: parameter.data for name, parameter in model.named_parameters()}, aliases
