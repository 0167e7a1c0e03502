"""Starting vLLM: its environment, its settings, its process. The one file that imports vllm in the main process.

Pinned to vLLM 0.32: the start method, the worker extension and the unpacked CPU weights lean on its insides, and
opening an engine checks each of them. Run on the CPU build; what is set for a GPU is vLLM's defaults plus ours,
and is not run by this project's tests.
"""
# ruff: noqa: E402 - torch and vLLM read the environment when they are imported

import contextlib
import logging
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from pydantic import ValidationError
from transformers import AutoConfig

CPU = torch.version.cuda is None and torch.version.hip is None
"""Whether this machine's build of torch, and so of vLLM, is the one for CPUs."""
WORKER = "server.engines.vllm_worker.WeightLoader"
"""What vLLM mixes into its worker."""
TRANSFER_WORKER = "server.engines.vllm_transfer_worker.TransferLoader"
"""The same, where weights may come by broadcast."""
TRANSFER_BACKEND = "spoke"
"""Our engine in vLLM's registry of weight-transfer engines, which `TRANSFER_WORKER` registers."""
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_MAX_STOP_STRINGS": "16",  # of an OpenAI request, as in `POST /rollout_tree`; vLLM takes 4
}
if CPU:
    # Two processes instead of three, and no C++ compiler at the first logprob.
    _ENVIRONMENT |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from vllm import SamplingParams
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import utils as vllm_processes
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server.engines import vllm_child
from server.engines.base import EngineInfo
from server.engines.settings import EngineSettings
from shared.errors import ConfigError

__all__ = [
    "AsyncLLM",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "VLLMClientError",
    "reason",
    "start",
    "start_method",
    "tokens_input",
]


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))


# That vLLM's process is gone is said by whoever ends this server for it, in one line and not in ten.
logging.getLogger("vllm.v1.engine.async_llm").addFilter(_is_news)


def start(
    settings: EngineSettings, by_the_loop: Callable[[Callable[[], None]], None]
) -> tuple[AsyncLLM, EngineInfo]:
    """Start vLLM's process and load the model; blocks for 8 seconds to minutes: called beside the event loop.

    Args:
        settings: of the engine.
        by_the_loop: runs a call in the event loop's thread and waits for it; see `vllm_launch`.

    Raises:
        ConfigError: no such checkpoint, device, number format or limit.
        Exception: whatever vLLM raises when it starts.
    """
    built_for = "cpu" if CPU else "cuda"
    if settings.device not in ("auto", built_for):
        raise ConfigError(f"device {settings.device}: the vLLM installed here is for {built_for}")
    if settings.weight_transfer == "nccl" and CPU:
        raise ConfigError("--weight-transfer nccl: NCCL runs between GPUs; on a CPU use gloo")
    if settings.dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype {settings.dtype}: must be auto, float32 or bfloat16")
    if settings.model.startswith((".", "/")) and not Path(settings.model).is_dir():
        raise ConfigError(f"model {settings.model}: no such folder")  # and surely no hub id
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # for a process that starts afresh
    with warnings.catch_warnings():
        # vLLM's own deprecations, here and in a forked child, mean nothing to whoever starts a server.
        warnings.filterwarnings("ignore", module=r"vllm\.|torch\.")
        try:
            config = _arguments(settings).create_engine_config()
        except (
            Exception
        ) as error:  # what vLLM, transformers or the hub say of a checkpoint or a limit
            raise ConfigError(f"model {settings.model}: {reason(error)}") from error
        # Only now: on a CPU, creating the configuration chooses `spawn`, which imports everything a second time.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method()
        with _started_by(by_the_loop, settings.threads):
            llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    return llm, _info(settings, config)


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def start_method() -> str:
    """How the CPU engine's process starts: `fork`, 10 seconds quicker, where this process has its main thread and
    the one that asks.

    Else `spawn`: a forked child has none of its parent's other threads, but every lock that they held.
    `SPOKE_VLLM_START` decides otherwise.
    """
    tasks = Path("/proc/self/task")
    known = {str(os.getpid()), str(threading.get_native_id())}
    alone = tasks.is_dir() and known.issuperset(task.name for task in tasks.iterdir())
    return os.environ.get("SPOKE_VLLM_START") or ("fork" if alone else "spawn")


@contextlib.contextmanager
def _started_by(by_the_loop: Callable[[Callable[[], None]], None], threads: int) -> Iterator[None]:
    """Let the event loop's thread start the processes of the vLLM that is made meanwhile."""

    class Manager(vllm_processes.CoreEngineProcManager):  # type: ignore[misc]  # mypy skips vLLM
        def __init__(self, *args: object, **kwargs: object) -> None:
            def start_processes() -> None:
                torch.set_num_threads(threads)  # of this thread, and so of a process that it forks
                with _tied_to_us():
                    super(Manager, self).__init__(*args, **kwargs)

            by_the_loop(start_processes)

    usual = vllm_processes.CoreEngineProcManager
    vllm_processes.CoreEngineProcManager = Manager  # its maker finds it by this name
    try:
        yield
    finally:
        vllm_processes.CoreEngineProcManager = usual


@contextlib.contextmanager
def _tied_to_us() -> Iterator[None]:
    """Let `vllm_child.run` be the first that the processes do which vLLM makes meanwhile."""
    usual = vllm_processes.get_mp_context

    class Context:
        def __init__(self) -> None:
            self._context = usual()

        def Process(self, *, target: Any, name: str, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - vLLM's
            tied = partial(vllm_child.run, os.getpid(), target)
            return self._context.Process(target=tied, name=name, kwargs=kwargs)

    vllm_processes.get_mp_context = Context  # its caller finds it by this name
    try:
        yield
    finally:
        vllm_processes.get_mp_context = usual


def _arguments(settings: EngineSettings) -> AsyncEngineArgs:
    args: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "seed": secrets.randbits(31) if settings.seed is None else settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_batch,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if settings.weight_transfer is not None:
        args["worker_extension_cls"] = TRANSFER_WORKER
        args["weight_transfer_config"] = WeightTransferConfig(backend=TRANSFER_BACKEND)
    if settings.dtype == "auto":
        saved = AutoConfig.from_pretrained(settings.model).dtype
        if saved in (torch.float32, torch.bfloat16):
            args["dtype"] = str(saved).removeprefix("torch.")  # vLLM's auto would halve float32
    if CPU:
        args |= {
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            # A prompt cut into pieces kills the engine where its request has a seed: vLLM turns back the
            # generator of a sample that it drops, and generators of the CPU cannot be turned back.
            "enable_chunked_prefill": False,
        }
    else:
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return AsyncEngineArgs(**args)


def _info(settings: EngineSettings, config: VllmConfig) -> EngineInfo:
    model = config.model_config
    ends = model.try_get_generation_config().get("eos_token_id")
    if ends is None:
        ends = getattr(model.hf_text_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    size = model.get_vocab_size()
    return EngineInfo(
        engine="vllm",
        model=settings.model,
        dtype=str(model.dtype).removeprefix("torch."),
        device="cpu" if CPU else current_platform.get_device_name(),
        vocab_size=size,
        max_model_len=model.max_model_len,
        eos_token_ids=tuple(end for end in ends if end is not None and 0 <= end < size),
        max_batch=config.scheduler_config.max_num_seqs,
        kv_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        block_tokens=config.cache_config.block_size,
    )
