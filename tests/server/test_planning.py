"""Which files are fetched: the fewest bytes that lead from what is held to the version wanted.

The naive twin tries every anchor and every held version, and knows all manifests. Further back than both the
newest anchor and all that is held neither looks: manifests have bytes too, and anchors are about equally large.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.planning import plan
from shared.digests import sha256
from shared.errors import WeightsError
from shared.manifest import DeltaEntry, Encoding, FileEntry, Manifest, TensorEntry


def run_of(sizes: list[tuple[int, int | None]]) -> list[Manifest]:
    """Manifests whose deltas, and anchors where there is one, have these sizes; the first is an anchor."""
    made: list[Manifest] = []
    for version, (delta, anchor) in enumerate(sizes):
        name = f"d-{version}"
        step = None
        if made:
            file = FileEntry(name=name, size=delta, sha256="0")
            step = DeltaEntry(
                base_version=version - 1, base_digest=made[-1].weights_digest, files=(file,)
            )
        shards = (FileEntry(name=f"a-{version}", size=anchor or 0, sha256="0"),)
        full = anchor is not None or step is None
        tensor = TensorEntry(name="w", dtype="F32", shape=(1,), sha256=sha256(name.encode()))
        made.append(
            Manifest(
                run="run",
                version=version,
                dtype="float32",
                tensors=(tensor,),
                encoding=Encoding.FULL if full else Encoding.DELTA,
                files=shards if full or step is None else step.files,
                base_version=None if full or step is None else step.base_version,
                base_digest="" if full or step is None else step.base_digest,
                shortcut=step if full else None,
            ).seal()
        )
    return made


async def planned(
    manifests: list[Manifest], held: set[int], missing: frozenset[int] = frozenset()
) -> list[str]:
    asked: list[int] = []

    async def manifest_of(version: int, digest: str) -> Manifest:
        asked.append(version)
        if version in missing:
            raise WeightsError(f"version {version} is not there")
        assert manifests[version].weights_digest == digest
        return manifests[version]

    steps = await plan(
        manifests[-1],
        held=lambda version, digest: (
            version in held and manifests[version].weights_digest == digest
        ),
        lowest=min(held, default=None),
        manifest_of=manifest_of,
    )
    assert len(asked) == len(set(asked))
    versions = [step.manifest.version for step in steps]
    assert versions == sorted(versions)
    return [entry.name for step in steps for entry in step.files]


def naive(sizes: list[tuple[int, int | None]], held: set[int]) -> int:
    """Fewest bytes."""
    costs = []
    newest = max(v for v, (_, anchor) in enumerate(sizes) if anchor is not None)
    for start, (_, anchor) in enumerate(sizes):
        if start < min({newest} | held):
            continue
        rest = sum(delta for delta, _ in sizes[start + 1 :])
        if start in held:
            costs.append(rest)
        if anchor is not None:
            costs.append(rest + (anchor or 0))
    return min(costs)


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 50), st.none() | st.integers(1, 200)), min_size=1, max_size=12
    ),
    held=st.sets(st.integers(0, 11), max_size=3),
)
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=200)
async def test_no_plan_needs_fewer_bytes(
    sizes: list[tuple[int, int | None]], held: set[int]
) -> None:
    sizes[0] = (sizes[0][0], sizes[0][1] or 100)
    held = {version for version in held if version < len(sizes)}
    manifests = run_of(sizes)
    cost = {f"d-{v}": delta for v, (delta, _) in enumerate(sizes)}
    cost |= {f"a-{v}": anchor or 0 for v, (_, anchor) in enumerate(sizes)}
    assert sum(cost[name] for name in await planned(manifests, held)) == naive(sizes, held)


async def test_one_step_behind_is_one_delta() -> None:
    manifests = run_of([(1, 100), (1, None), (1, None), (1, 100)])
    assert await planned(manifests, {2}) == ["d-3"]
    assert await planned(manifests, {3}) == []
    assert await planned(manifests, set()) == ["a-3"]


async def test_a_manifest_that_is_gone_leaves_the_anchor() -> None:
    manifests = run_of([(1, 100), (1, None), (1, None), (1, 100), (1, None)])
    assert await planned(manifests, {1}, frozenset({2})) == ["a-3", "d-4"]


async def test_without_an_anchor_it_says_what_is_missing() -> None:
    manifests = run_of([(1, 100), (1, None), (1, None)])
    with pytest.raises(WeightsError, match="version 1 is not there"):
        await planned(manifests, set(), frozenset({1}))


def test_the_helper_makes_sound_manifests(tmp_path: Path) -> None:
    for manifest in run_of([(1, 100), (1, None), (1, 5)]):
        assert Manifest.decode(manifest.encode(), run="run", version=manifest.version) == manifest
