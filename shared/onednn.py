"""How many compiled kernels a process keeps on a CPU.

torch and vLLM multiply bfloat16 matrices on a CPU by oneDNN, which compiles a kernel for every shape that it
meets, a quarter of a MiB of machine code each, and keeps the last 1024; torch keeps as many once more. Sampling
meets new shapes with every row that ends and every few tokens: a server grew by half a GiB that way, and an engine
of vLLM and a trainer likewise. A step needs some ten or thirty of them; compiling one takes about a millisecond.
"""

import os

KERNELS = 128
"""Kept in each of the two caches: at least the last four steps' shapes."""


def bound_kernels() -> None:
    """Bound both caches, of this process and of those that it starts; what the environment says already stays.

    They are read at the first product of two matrices: call it before a model is loaded.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(KERNELS))
