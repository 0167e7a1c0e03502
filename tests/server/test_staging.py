"""Staged changes of a model's memory: what each writes, that it can be undone, and what is refused before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from described import tensor_entries
from safetensors.torch import save_file

from server.engines import staging
from server.engines.memory import spare_bytes
from server.engines.staging import (
    Exchange,
    Overwrite,
    Scatter,
    TornError,
    live_digests,
    stage_full,
    stage_patch,
    write,
)
from shared.errors import WeightsError
from tests.contract.plain import Broken

Tensors = dict[str, torch.Tensor]

FUSED = {"q": (0, 6), "k": (6, 2), "v": (8, 2)}


def memory(dtype: torch.dtype) -> Tensors:
    """Slots of every kind: rows of a fused matrix, one that lies transposed, a padded vocabulary, a scalar."""
    noise = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise).to(dtype)

    fused = some(10, 5)
    slots = {name: fused.narrow(0, start, rows) for name, (start, rows) in FUSED.items()}
    return slots | {"turned": some(7, 4).T, "vocabulary": some(64, 3)[:50], "scale": some(1)[0]}


def clone(slots: Tensors) -> Tensors:
    return {name: slot.clone() for name, slot in slots.items()}


def assert_equal(slots: Tensors, expected: Tensors) -> None:
    assert slots.keys() == expected.keys()
    for name, slot in slots.items():
        assert torch.equal(slot, expected[name]), name


def patch_of(changed: dict[str, tuple[list[int], torch.Tensor]], file: Path) -> Path:
    parts: Tensors = {}
    for name, (indices, values) in changed.items():
        parts[f"{name}.indices"] = torch.tensor(indices, dtype=torch.int32)
        parts[f"{name}.values"] = values
    save_file(parts, file)
    return file


def changes_of(slots: Tensors, share: float) -> tuple[dict[str, Any], Tensors]:
    """A patch of a share of every slot, at least one element, and the tensors that must come of it."""
    noise = torch.Generator().manual_seed(1)
    changed, expected = {}, {}
    for name, slot in slots.items():
        flat = slot.flatten().clone()
        count = max(1, int(share * flat.numel()))
        places = torch.randperm(flat.numel(), generator=noise)[:count].sort().values
        flat[places] = values = torch.randn(count, generator=noise).to(slot.dtype)
        changed[name] = (places.tolist(), values)
        expected[name] = flat.view(slot.shape)
    return changed, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_patch_changes_its_elements_and_no_others(tmp_path, dtype, share):
    slots = memory(dtype)
    changed, expected = changes_of(slots, share)
    staged = stage_patch(slots, {}, [patch_of(changed, tmp_path / "patch.safetensors")])
    before = clone(slots)
    write(staged)
    assert_equal(slots, expected)
    with torch.inference_mode():
        for change in staged:
            change.undo()
    assert_equal(slots, before)


def test_much_of_a_tensor_is_staged_as_all_of_it(tmp_path):
    slots = {"few": torch.zeros(1000), "many": torch.zeros(1000)}
    changed = {"few": ([5], torch.ones(1)), "many": (list(range(0, 1000, 2)), torch.ones(500))}
    staged = stage_patch(slots, {}, [patch_of(changed, tmp_path / "patch.safetensors")])
    assert [type(change) for change in staged] == [Scatter, Exchange]
    # Never more than a second copy of what changes.
    assert sum(change.nbytes for change in staged) <= 2 * 4000


@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_cast_to_the_models_number_format(tmp_path, published):
    slots = {"w": torch.zeros(100, dtype=torch.bfloat16)}
    value = torch.tensor([1 / 3], dtype=published)
    write(stage_patch(slots, {}, [patch_of({"w": ([7], value)}, tmp_path / "p.safetensors")]))
    assert float(slots["w"][7]) == float(torch.tensor(1 / 3).bfloat16())


@pytest.mark.parametrize("room", [True, False])
def test_a_full_set_replaces_every_tensor(tmp_path, monkeypatch, room):
    slots = memory(torch.float32)
    _, expected = changes_of(slots, 1.0)
    file = tmp_path / "full.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, file)
    if not room:
        monkeypatch.setattr(staging, "spare_bytes", lambda: 100)
    staged = stage_full(slots, {}, [file])
    assert {type(change) for change in staged} == {Exchange if room else Overwrite}
    write(staged)
    assert_equal(slots, expected)


def test_a_large_tensor_is_exchanged_in_pieces(monkeypatch):
    monkeypatch.setattr(staging, "PIECE", 8)
    for slot in (torch.zeros(5, 7), torch.zeros(7, 5).T, torch.zeros(21)):
        change = Exchange(slot, torch.arange(float(slot.numel())).view(slot.shape))
        change.apply()
        assert slot.flatten().tolist() == list(range(slot.numel()))
        assert change.exchanged > 2
        change.undo()
        assert not slot.any()


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("kind", ["patch", "full"])
def test_a_write_that_fails_half_way_leaves_the_old_bytes(tmp_path, at, kind):
    slots = memory(torch.bfloat16)
    before = clone(slots)
    changed, expected = changes_of(slots, 0.1)
    if kind == "patch":
        staged = stage_patch(slots, {}, [patch_of(changed, tmp_path / "patch.safetensors")])
    else:
        save_file({n: t.contiguous() for n, t in expected.items()}, tmp_path / "full.safetensors")
        staged = stage_full(slots, {}, [tmp_path / "full.safetensors"])
    staged.insert(at, Broken())
    with pytest.raises(WeightsError, match=r"undone: RuntimeError\('out of luck'\)"):
        write(staged)
    assert_equal(slots, before)


def test_what_cannot_be_undone_says_so(tmp_path, monkeypatch):
    slots = memory(torch.float32)
    file = tmp_path / "full.safetensors"
    save_file({name: torch.zeros(slot.shape) for name, slot in slots.items()}, file)
    monkeypatch.setattr(staging, "spare_bytes", lambda: 0)
    staged = stage_full(slots, {}, [file])
    staged.insert(2, Broken())
    with pytest.raises(TornError, match=r"out of luck.*the old weights are lost"):
        write(staged)


I32, I64, F32 = torch.int32, torch.int64, torch.float32


def parts(indices: Any, values: Any, name: str = "q") -> Tensors:
    return {f"{name}.indices": indices, f"{name}.values": values}


@pytest.mark.parametrize(
    ("patch", "named"),
    [
        ({"q.indices": torch.zeros(1, dtype=I32)}, r"q\.values is missing"),
        ({"q.values": torch.zeros(1)}, r"q\.indices is missing"),
        ({"q": torch.zeros(1)}, "q is no part of a patch"),
        (parts(torch.zeros(1, dtype=I32), torch.zeros(1), "x"), "x is not a tensor of this model"),
        (parts(torch.zeros(1), torch.zeros(1)), "indices of torch.float32"),
        (parts(torch.zeros(1, dtype=I32), torch.zeros(1, dtype=I32)), "values of torch.int32"),
        (parts(torch.zeros(1, dtype=I32), torch.zeros(2)), "lists of one length"),
        (parts(torch.zeros(1, 1, dtype=I32), torch.zeros(1, 1)), "lists of one length"),
        (parts(torch.tensor([30], dtype=I32), torch.zeros(1)), "from 30 to 30, .* has 30 places"),
        (parts(torch.tensor([-1], dtype=I64), torch.zeros(1)), "from -1 to -1"),
        (parts(torch.tensor([3, 2], dtype=I64), torch.zeros(2)), "not in ascending order"),
        (parts(torch.tensor([2, 2], dtype=I32), torch.zeros(2)), "not in ascending order"),
    ],
)  # fmt: skip
def test_a_patch_that_does_not_fit_is_refused(tmp_path, patch, named):
    file = tmp_path / "patch.safetensors"
    save_file(patch, file)
    with pytest.raises(WeightsError, match=named):
        stage_patch(memory(F32), {}, [file])


def test_one_part_in_two_files_is_refused(tmp_path):
    files = [patch_of({"q": ([0], torch.ones(1))}, tmp_path / f"{n}.safetensors") for n in range(2)]
    with pytest.raises(WeightsError, match=r"appears twice, in 1\.safetensors"):
        stage_patch(memory(F32), {}, files)


def test_parts_may_lie_in_different_files(tmp_path):
    slots = memory(F32)
    whole = parts(torch.tensor([4], dtype=I32), torch.tensor([9.0]))
    files = [tmp_path / f"{name}.safetensors" for name in whole]
    for file, (name, tensor) in zip(files, whole.items(), strict=True):
        save_file({name: tensor}, file)
    write(stage_patch(slots, {}, files))
    assert slots["q"].flatten()[4] == 9.0


def test_tied_names_of_a_patch_must_agree(tmp_path):
    def patched(head: float | None, place: int = 3) -> float:
        slots = {"embedding": torch.zeros(5)}
        changed = {} if head is None else {"head": ([place], torch.tensor([head]))}
        changed |= {"embedding": ([3], torch.ones(1))} if head != 7.0 else {}
        file = patch_of(changed, tmp_path / "patch.safetensors")
        write(stage_patch(slots, {"head": "embedding"}, [file]))
        return float(slots["embedding"][3])

    assert (patched(None), patched(1.0), patched(7.0)) == (1.0, 1.0, 7.0)
    for wrong in (lambda: patched(2.0), lambda: patched(1.0, place=4)):
        with pytest.raises(WeightsError, match="head differs from embedding"):
            wrong()


@pytest.mark.parametrize("kind", [stage_full, stage_patch])
def test_a_damaged_file_is_named(tmp_path, kind: Callable[..., Any]):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not safetensors")
    for file in (bad, tmp_path / "absent.safetensors"):
        with pytest.raises(WeightsError, match=file.name):
            kind(memory(F32), {}, [file])


@pytest.mark.parametrize(
    ("published", "held"),
    [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")],
)
def test_live_digests_are_those_of_the_published_file(tmp_path, published, held):
    slots = memory(getattr(torch, published))
    file = tmp_path / "full.safetensors"
    save_file({name: slot.contiguous() for name, slot in slots.items()}, file)
    live = {name: slot.to(getattr(torch, held)) for name, slot in slots.items()}
    expected = {entry.name: entry.sha256 for entry in tensor_entries(file)}
    assert live_digests(live, getattr(torch, published)) == expected
    live["k"][0, 0] += 1
    differs = live_digests(live, getattr(torch, published))
    assert {name for name in expected if differs[name] != expected[name]} == {"k"}


def test_progress_is_told_after_each_tensor(tmp_path):
    steps: list[None] = []
    slots = memory(F32)
    changed, _ = changes_of(slots, 0.1)
    stage_patch(
        slots, {}, [patch_of(changed, tmp_path / "p.safetensors")], lambda: steps.append(None)
    )
    live_digests(slots, F32, lambda: steps.append(None))
    assert len(steps) == 2 * len(slots)


def test_spare_memory_is_the_lesser_of_machine_and_container(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    nothing = spare_bytes(meminfo, cgroup)
    assert nothing > 1 << 60
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert spare_bytes(meminfo, cgroup) == 50 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("40000\n")
    (cgroup / "memory.current").write_text("30000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    assert spare_bytes(meminfo, cgroup) == 15000
    (cgroup / "memory.max").write_text("max\n")
    assert spare_bytes(meminfo, cgroup) == 50 * 1024
