"""What changed in one tensor: exact, small, and suspicious of what it reads.

1. Decoding what was encoded gives the new bits, all of them, whatever they mean as numbers.
2. Equal tensors give nothing; indices ascend; values are absolute, so writing twice is harmless.
3. A damaged or hostile blob raises WeightsError, and never makes more than its tensor's size of memory.
4. A blob of a training step is small.
"""

import tracemalloc
from itertools import product
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared import delta, delta_streams
from shared.delta import decode, encode
from shared.errors import WeightsError

Bits = NDArray[Any]
WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def naive(base: Bits, new: Bits) -> tuple[list[int], list[int]]:
    """The naive twin: places and values of what differs, one by one."""
    pairs = [
        (i, int(b)) for i, (a, b) in enumerate(zip(base, new, strict=True)) if int(a) != int(b)
    ]
    return [i for i, _ in pairs], [value for _, value in pairs]


def check(base: Bits, new: Bits) -> bytes | None:
    blob = encode(base, new)
    places, values = naive(base, new)
    if blob is None:
        assert not places
        return None
    patch = decode(blob, base)
    assert patch.indices.tolist() == places
    assert patch.values.tolist() == values
    assert patch.values.dtype == base.dtype
    target = base.copy()
    for _ in range(2):
        patch.write_into(target)
        assert np.array_equal(target, new)
    return blob


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Bits, Bits]:
    """Two versions of a tensor, some elements moved a little and some to anywhere."""
    kind = WIDTHS[draw(st.sampled_from(sorted(WIDTHS)))]
    size = draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = rng.integers(0, np.iinfo(kind).max, size, kind, endpoint=True)
    base >>= kind(draw(st.integers(0, 8 * base.itemsize - 1)))
    new = base.copy()
    near = rng.random(size) < draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    new[near] += rng.integers(0, 3, int(near.sum()), kind) - kind(1)
    far = rng.random(size) < draw(st.sampled_from([0.0, 0.01, 1.0]))
    new[far] = rng.integers(0, np.iinfo(kind).max, int(far.sum()), kind, endpoint=True)
    return base, new


@given(pairs(), st.sampled_from([1, 7, 64, delta.SEGMENT]), st.sampled_from([1, 16]))
@settings(deadline=None, max_examples=300)
def test_what_was_encoded_comes_back(pair: tuple[Bits, Bits], segment: int, share: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(delta, "SEGMENT", segment)
        patched.setattr(delta_streams, "_ORDERING_COSTS", 0.0)
        patched.setattr(delta_streams, "_BLOCK", 16)
        patched.setattr(
            delta_streams, "_ORDERED_SHARE", share
        )  # 1: all elements are ordered by magnitude
        check(*pair)


@pytest.mark.parametrize("kind", WIDTHS.values())
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_nothing_changed_and_everything_changed(kind: type[np.uint16], size: int) -> None:
    base = np.arange(size).astype(kind)
    assert encode(base, base.copy()) is None
    blob = check(base, ~base)
    assert (blob is None) == (size == 0)


def test_special_floats_keep_their_bits() -> None:
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1.0, 3.4e38], np.float32
    ).view(np.uint32)
    signalling = np.array([0x7F800001, 0xFFFFFFFF], np.uint32)
    values = np.concatenate([special, signalling])
    base, new = (part.ravel() for part in np.meshgrid(values, values))
    check(base.copy(), new.copy())
    check((base >> 16).astype(np.uint16), (new >> 16).astype(np.uint16))


def test_a_step_to_the_next_float_costs_a_byte_plane_at_most() -> None:
    """Differences of neighbours are -1 and +1 across the sign and every exponent."""
    base = np.arange(1 << 16, dtype=np.uint16)
    up = np.array([0x0000 if b == 0x8000 else b + (1 if b < 0x8000 else -1) for b in base.tolist()])
    assert set(delta_streams.fold(base, up.astype(np.uint16)).tolist()[:0x7FFF]) == {1}
    folded = delta_streams.fold(base, up.astype(np.uint16))
    assert set(folded[0x8000:].tolist()) == {1}


def step(size: int, moved: float, seed: int = 0) -> tuple[Bits, Bits]:
    """bf16 weights of a usual spread, and the same after float32 masters moved by about `moved`."""
    rng = np.random.default_rng(seed)
    masters = rng.normal(0, 0.02, size).astype(np.float32)
    after = masters + (rng.normal(0, moved, size)).astype(np.float32)
    return bfloat16(masters), bfloat16(after)


def bfloat16(values: NDArray[np.float32]) -> Bits:
    bits = values.view(np.uint32)
    rounded: Bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def test_a_step_of_training_is_small() -> None:
    base, new = step(1 << 20, 3e-7)
    blob = encode(base, new)
    assert blob is not None
    changed = int((base != new).sum())
    share = changed / base.size
    entropy = changed * (-share * np.log2(share) - (1 - share) * np.log2(1 - share)) / share
    # Which ones changed, if any were as likely, and one bit each for the direction.
    assert len(blob) * 8 < 1.05 * (entropy + changed)
    check(base[: 1 << 14].copy(), new[: 1 << 14].copy())


def test_ordering_by_magnitude_is_worth_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base, new = step(1 << 20, 3e-7)
    ordered = encode(base, new)
    monkeypatch.setattr(delta, "choose_limit", lambda base, coarse: 0)
    plain = encode(base, new)
    assert ordered is not None
    assert plain is not None
    assert np.array_equal(decode(plain, base).indices, decode(ordered, base).indices)
    assert len(ordered) < 0.93 * len(plain)


def test_large_tensors_get_int64_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2**31 elements int32 does not reach; the bound is lowered here, since 4 GB are not to be had."""
    base, new = step(1000, 1e-3)
    blob = encode(base, new)
    assert blob is not None
    assert decode(blob, base).indices.dtype == np.int32
    monkeypatch.setattr(delta, "MOST_INT32", 999)
    monkeypatch.setattr(delta, "SEGMENT", 128)
    check(base, new)
    blob = encode(base, new)
    assert blob is not None
    assert decode(blob, base).indices.dtype == np.int64


def test_places_beyond_int32_do_not_wrap() -> None:
    part, start = np.array([0, 5], np.int64), (1 << 31) + 7
    assert delta._shifted(part, start, 1 << 32).tolist() == [start, start + 5]


def test_a_blob_is_for_its_tensor_alone() -> None:
    base, new = step(500, 1e-3)
    blob = encode(base, new)
    assert blob is not None
    with pytest.raises(WeightsError, match="500 elements of 2 bytes, for a tensor of 499 of 2"):
        decode(blob, base[:-1])
    with pytest.raises(WeightsError, match="for a tensor of 500 of 4"):
        decode(blob, base.astype(np.uint32))
    with pytest.raises(WeightsError, match="not a delta"):
        decode(b"nothing of the kind", base)
    with pytest.raises(WeightsError, match="behind its end"):
        decode(blob + b"\0", base)


def test_every_cut_is_refused() -> None:
    base, new = step(300, 1e-3)
    blob = encode(base, new)
    assert blob is not None
    for length in range(len(blob)):
        with pytest.raises(WeightsError):
            decode(blob[:length], base)


@given(st.data())
@settings(deadline=None, max_examples=500)
def test_damage_is_refused_or_stays_in_the_tensor(data: st.DataObject) -> None:
    """What cannot be refused gives places in range, ascending: the hash of the result finds it."""
    base, new = step(2000, 1e-4)
    blob = bytearray(encode(base, new) or b"")
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        patch = decode(bytes(blob), base)
    except WeightsError:
        return
    assert (np.diff(patch.indices) > 0).all()
    assert patch.indices.size == patch.values.size
    assert not patch.indices.size or 0 <= patch.indices[0] <= patch.indices[-1] < base.size


def test_a_small_blob_cannot_claim_much_memory() -> None:
    base = np.zeros(1000, np.uint16)
    said = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28))
    for bomb, counts in product([said, unsaid], [(1000, 0), (1, 0), (0, 1000), (1 << 31, 1 << 31)]):
        for planes in [(1, 1, 1), (4, 4, 2), (255, 255, 255)]:
            head = delta._HEAD.pack(delta._MAGIC, 2, 1000)
            blob = head + delta._SEGMENT_HEAD.pack(*counts, 0, *planes, len(bomb)) + bomb
            tracemalloc.start()
            with pytest.raises(WeightsError):
                decode(blob, base)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
            tracemalloc.stop()


def test_an_element_named_twice_is_refused() -> None:
    """Below the limit and above it at once: only a blob that no encoder made."""
    base = np.zeros(10, np.uint16)
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes([0, 0]))
    head = delta._HEAD.pack(delta._MAGIC, 2, 10)
    segment = delta._SEGMENT_HEAD.pack(1, 1, 1, 1, 1, 0, len(frame))
    with pytest.raises(WeightsError, match="names an element twice"):
        decode(head + segment + frame, base)
