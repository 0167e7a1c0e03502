"""The quickstart's supervised warm start: `spoke warmstart`.

Trains a byte-level BPE tokenizer and a small Qwen2-shaped decoder on the stories of `problems`, with
the loss on the answer and its end token, and saves both as a Hugging Face model folder. One torch
thread and one seed: the same settings give the same bytes.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trainer.problems import Row, Split, rows

END, PAD = "<|end|>", "<|pad|>"
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmstartSettings:
    """Everything that decides the bytes of a warm start."""

    out: Path
    """Folder of the saved model; made if missing."""
    seed: int = 0
    """Of the data, the initial weights and the order of batches."""
    problems: int = 40_000
    """Training problems, drawn once and passed over as often as the steps need."""
    careless: float = 0.0
    """Share of demonstrations by a teacher who reads "twice" as +2 and "half" as -2."""
    steps: int = 2_000
    """Optimizer steps."""
    batch: int = 24
    """Problems in a step."""
    learning_rate: float = 3e-3
    """Peak of the schedule: linear warm-up over 5 % of the steps, then linear decay to 5 %."""
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


def make_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocabulary`` pieces in which every digit stands alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(settings: WarmstartSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a freshly initialised model in float32 (0.84 M parameters by default)."""
    heads = settings.width // 32
    config = Qwen2Config(
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
    return Qwen2ForCausalLM(config).float()


def encode(tokenizer: PreTrainedTokenizerFast, problems: list[Row]) -> list[tuple[list[int], int]]:
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


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at ``step`` (from 0): warm-up, then decay."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 1 - 0.95 * (step - warm) / max(1, steps - warm)


def train(
    model: Qwen2ForCausalLM,
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
            group["lr"] = settings.learning_rate * schedule(step, settings.steps)
        tokens, targets = collate([examples[i] for i in next(picks)], pad)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            seconds = time.monotonic() - started
            report(f"step {step + 1}/{settings.steps}  loss {mean:.4f}  {seconds:.0f} s")
    return losses
