"""Kernels that a CPU compiles for bfloat16 are kept by the hundred, and not for every shape there ever was.

Whoever loads a model bounds them, in time: before its own first product. Measured are the bytes that the heap has
in use, each time in a new process, since both caches are set up once in a process.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHAPES = 400
"""Kept all, they took 212 MiB; bounded, 34 to 70."""

PROGRAM = """
import asyncio, ctypes, sys, torch

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
torch.set_num_threads(1)

def engine(model):
    from server.engines import EngineName, EngineSettings, open_engine
    async def run():
        settings = EngineSettings(model=model, dtype="bfloat16", device="cpu")
        opened = await open_engine(EngineName.TRANSFORMERS, settings)
        await opened.check()
        await opened.close()
    asyncio.run(run())

def policy(model):
    from trainer.policy import load_policy
    load_policy(model, torch.bfloat16)(torch.zeros(1, 3, dtype=torch.int64))

globals()[sys.argv[1]](sys.argv[2])
weight, before = torch.zeros(384, 128, dtype=torch.bfloat16), mallinfo().used
for rows in range(1, int(sys.argv[3]) + 1):
    torch.zeros(rows, 128, dtype=torch.bfloat16) @ weight.T
print((mallinfo().used - before) // 2**20)
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="torch multiplies bfloat16 otherwise here",
)
@pytest.mark.parametrize("loaded", ["engine", "policy"])
def test_kernels_of_many_shapes_stay_few(
    loaded: str, tiny_math: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What another test's engine has put into this process's environment.
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, loaded, str(tiny_math), str(SHAPES)],
        capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 120
