"""What an engine is opened with; the same for both engines."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Checkpoint, number format and limits of one engine."""

    model: str
    """Directory or hub id of the checkpoint, in Hugging Face format."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, or `auto`: what the checkpoint says."""
    max_model_len: int | None = None
    """Most tokens of prompt plus response; None is the model's own limit."""
    device: str = "auto"
    """`auto` is a GPU where there is one; `cpu`; `cuda`."""
    threads: int = 1
    """Torch threads on a CPU. On few shared cores one is the fastest."""
    seed: int | None = None
    """Of the engine, for requests that bring none of their own; None takes a new one at every start, since servers
    that start alike would sample alike."""
    kv_cache_gib: float = 1.0
    """Memory for keys and values on a CPU, GiB; transformers: half for running rows, half for prefixes."""
    max_batch: int = 256
    """Most sequences that run at once; the others wait."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that the vLLM engine may take."""
    weight_transfer: str | None = None
    """`nccl` (GPUs) or `gloo` (CPUs): weights may come by broadcast from a trainer of the same cluster;
    vLLM only."""
