"""Supervised warm starts, the quickstart's and the free wording's: `spoke warmstart`.

Trains a byte-level BPE tokenizer and a small Qwen2-shaped decoder on the stories of `problems`,
with the loss on the answer and its end token, and saves both as a Hugging Face folder. One torch
thread and one seed: the same settings give the same bytes.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from trainer.problems import Row, Split, Wording, rows

END, PAD = "<|end|>", "<|pad|>"
_IGNORED = -100
_hf: Any = transformers  # its classes are typed in part only, which mypy --strict refuses
Model: TypeAlias = Any
"""A transformers.Qwen2ForCausalLM."""
HfTokenizer: TypeAlias = Any
"""A transformers.Qwen2Tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmstartSettings:
    """Everything that decides the bytes of a warm start."""

    out: Path
    """Folder of the saved model; made if missing."""
    seed: int = 0
    """Of the data, the initial weights and the order of batches."""
    problems: int = 40_000
    """Training problems, drawn once and passed over as often as the steps need."""
    steps: int = 950
    """Optimizer steps."""
    horizon: int = 1_500
    """Steps over which the learning rate decays. A stop well before its end leaves room to learn:
    answers sampled at temperature 1 are then much worse than greedy ones."""
    batch: int = 24
    """Problems in a step."""
    learning_rate: float = 3e-3
    """Peak of the schedule: linear warm-up over 5 % of the horizon, then linear decay to 5 %."""
    vocabulary: int = 352
    """Pieces of the tokenizer, the 256 bytes and two special tokens among them."""
    width: int = 128
    """Model width, in heads of 32 (vLLM on a CPU wants 32); half as many key-value heads."""
    layers: int = 4
    """Decoder layers."""
    mlp: int = 384
    """Width inside a layer's MLP."""
    heldout: int = 600
    """Held-out problems on which the result is measured; 0 measures nothing."""
    longest: int = 160
    """Most tokens of a measured answer."""
    wording: Wording = Wording.FIXED
    """Of the chains of thought."""


_OWN: dict[Wording, dict[str, int]] = {
    Wording.FIXED: {},
    Wording.FREE: {"steps": 850, "vocabulary": 512},
}
"""What a wording's warm start does otherwise: its stop, and pieces enough for its words."""


def settings_for(wording: Wording, out: Path, **given: int) -> WarmstartSettings:
    """Return the settings of a wording's own warm start, with ``given`` in place of some."""
    return WarmstartSettings(out=out, wording=wording, **{**_OWN[wording], **given})


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmstartResult:
    """What a warm start measured."""

    losses: list[float]
    """Of each step: mean negative log-probability of an answer token, in nats."""
    sampled: float
    """Share of held-out problems answered right at temperature 1, one sample each."""
    greedy: float
    """The same, decoded greedily."""


def make_tokenizer(texts: Iterator[str], vocabulary: int) -> HfTokenizer:
    """Train a byte-level BPE of ``vocabulary`` pieces in which every digit stands alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # AutoTokenizer makes a Qwen2Tokenizer for a Qwen2 model whatever class is saved, and that adds
    # a piece beyond the embedding unless its unknown token is one of ours.
    return _hf.Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=END,
        eos_token=END,
        pad_token=PAD,
    )


def make_model(settings: WarmstartSettings, tokenizer: HfTokenizer) -> Model:
    """Return a freshly initialised model in float32 (0.84 M parameters by default)."""
    heads = settings.width // 32
    config = _hf.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    return _hf.Qwen2ForCausalLM(config).float()


def encode(tokenizer: HfTokenizer, problems: list[Row]) -> list[tuple[list[int], int]]:
    """Return (token ids of question, newline, answer and end; length of the prompt) of each row.

    The prompt is encoded by itself, as a server encodes it.
    """
    prompts = tokenizer([f"{row['question']}\n" for row in problems])["input_ids"]
    answers = tokenizer([row["answer"] for row in problems])["input_ids"]
    end = tokenizer.eos_token_id
    return [([*p, *a, end], len(p)) for p, a in zip(prompts, answers, strict=True)]


def collate(examples: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input ids [B, T-1], targets [B, T-1]), right-padded; prompts are not targets."""
    width = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), width), pad)
    targets = torch.full((len(examples), width), _IGNORED)
    for i, (ids, prompt) in enumerate(examples):
        tokens[i, : len(ids)] = torch.tensor(ids)
        targets[i, prompt : len(ids)] = tokens[i, prompt : len(ids)]
    return tokens[:, :-1], targets[:, 1:]


def batches(lengths: list[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield endless lists of ``size`` indices of similar lengths, in random order."""
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        pool = size * 50
        for i in range(0, len(order) - size + 1, pool):
            near = sorted(order[i : i + pool], key=lengths.__getitem__)
            cuts = list(range(0, len(near) - size + 1, size))
            rng.shuffle(cuts)
            for cut in cuts:
                yield near[cut : cut + size]


def schedule(step: int, horizon: int) -> float:
    """Return the share of the peak learning rate at ``step`` (from 0): warm-up, then decay."""
    warm = max(1, round(0.05 * horizon))
    if step < warm:
        return (step + 1) / warm
    return 1 - 0.95 * min(1.0, (step - warm) / max(1, horizon - warm))


def train(
    model: Model,
    examples: list[tuple[list[int], int]],
    settings: WarmstartSettings,
    report: Callable[[str], None],
) -> list[float]:
    """Train in place and return the loss of every step (nats for each answer token)."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    picks = batches([len(ids) for ids, _ in examples], settings.batch, random.Random(settings.seed))
    pad, losses, started = model.config.pad_token_id, list[float](), time.monotonic()
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.horizon)
        tokens, targets = collate([examples[i] for i in next(picks)], pad)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            seconds = time.monotonic() - started
            report(f"step {step + 1}/{settings.steps}  loss {mean:.4f}  {seconds:.0f} s")
    return losses


@torch.inference_mode()
def measure(
    model: Model,
    tokenizer: HfTokenizer,
    problems: list[Row],
    *,
    greedy: bool,
    longest: int,
    seed: int = 0,
) -> float:
    """Return the share of problems that one answer each, sampled or greedy, gets right."""
    if not problems:
        return 0.0
    right, size = 0, 300
    torch.manual_seed(seed)
    model.eval()
    for i in range(0, len(problems), size):
        chunk = problems[i : i + size]
        prompts = [f"{row['question']}\n" for row in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        config = _hf.GenerationConfig(
            do_sample=not greedy,
            top_k=0 if not greedy else None,
            max_new_tokens=longest,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        output = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
        )
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(final(t) == final(r["answer"]) for t, r in zip(texts, chunk, strict=True))
    return right / len(problems)


def final(answer: str) -> str | None:
    """Return what follows the last ``####``, or None without one."""
    _, mark, tail = answer.rpartition("####")
    return tail.strip() if mark else None


def save(model: Model, tokenizer: HfTokenizer, out: Path) -> None:
    """Write a Hugging Face folder in bfloat16; the model keeps the rounded weights in float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = _hf.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
    model.float()


def run(settings: WarmstartSettings, report: Callable[[str], None]) -> WarmstartResult:
    """Make the warm start in ``settings.out``.

    report: gets one line of progress at a time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads sums in another order: other bytes
    try:
        return _run(settings, report)
    finally:
        torch.set_num_threads(threads)


def _run(settings: WarmstartSettings, report: Callable[[str], None]) -> WarmstartResult:
    problems = rows(Split.TRAIN, settings.seed, settings.problems, settings.wording)
    texts = (text for row in problems[:4000] for text in (f"{row['question']}\n", row["answer"]))
    tokenizer = make_tokenizer(texts, settings.vocabulary)
    model = make_model(settings, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    report(f"{parameters:,} parameters, {len(problems):,} problems, {settings.steps} steps")
    losses = train(model, encode(tokenizer, problems), settings, report)
    save(model, tokenizer, settings.out)
    heldout = rows(Split.HELDOUT, 0, settings.heldout, settings.wording)
    sampled, greedy = (
        measure(model, tokenizer, heldout, greedy=g, longest=settings.longest)
        for g in (False, True)
    )
    result = WarmstartResult(losses=losses, sampled=sampled, greedy=greedy)
    source = _source(settings, result, parameters)
    (settings.out / "SOURCE.md").write_text(source, encoding="utf-8")
    if heldout:
        report(f"held-out accuracy: {sampled:.1%} at temperature 1, {greedy:.1%} greedy")
    return result


def _source(settings: WarmstartSettings, result: WarmstartResult, parameters: int) -> str:
    """Say where a checkpoint comes from; without the date, which would change the bytes."""
    usual = settings_for(settings.wording, settings.out)
    named = [f.name for f in fields(settings) if f.name not in ("out", "seed", "wording")]
    changed = [name for name in named if getattr(settings, name) != getattr(usual, name)]
    free = settings.wording is not Wording.FIXED
    options = " ".join(
        f"--{name.replace('_', '-')} {getattr(settings, name)}"
        for name in ["seed", *changed, *["wording"] * free]
    )
    train, heldout = ("&wording=free", "?wording=free") if free else ("", "")
    return f"""# Where this checkpoint comes from

Made by `spoke warmstart --out DIR {options}`.

- Model: Qwen2-shaped, {parameters:,} parameters, {settings.layers} layers, width {settings.width}.
- Data: {settings.problems:,} problems of `problems:train?seed={settings.seed}{train}`,
  every answer right; loss on the answers and their end token.
- Training: {settings.steps} steps of {settings.batch} problems, peak learning rate
  {settings.learning_rate:g} with a schedule of {settings.horizon} steps: stopped early, on purpose.
- Loss over the last 100 steps: {sum(result.losses[-100:]) / len(result.losses[-100:]):.4f}
  nats for each answer token.
- Accuracy on the first {settings.heldout} problems of `problems:heldout{heldout}`, one answer each:
  {result.sampled:.1%} at temperature 1, {result.greedy:.1%} greedy.
"""
