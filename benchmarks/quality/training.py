"""Adapters, trained as people train them: a family of one shape at once, on one device.

The adapters of a family share the batches' forward passes and nothing else: the loss is the sum
of their losses and AdamW works entry by entry, so each is what it would be if trained alone.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from benchmarks.quality.model import ATTENTION, Row, Subject, Update
from benchmarks.quality.tasks import GENERAL, LIMITS, SPLITS, STYLES, Bank, Question, Split
from lego_core import LoraAdapter, LoraModule


@dataclass(frozen=True, slots=True)
class Family:
    """How the adapters of a family are trained; alpha is twice the rank.

    Attributes:
        attention: adapt the attention's layers only, instead of all linear ones.
        tasks: what they learn, one task or style each.
        steps: of `batch` examples an adapter.
        rate: the learning rate at its peak; it falls as half a cosine after a short warm-up.
    """

    name: str
    tasks: tuple[str, ...]
    rank: int
    rate: float
    steps: int
    seed: int
    attention: bool = False
    batch: int = 64


def train(family: Family, subject: Subject, bank: Bank) -> tuple[list[LoraAdapter], list[float]]:
    """Train a family; return its adapters in bfloat16 and their mean losses of the last steps."""
    draw = random.Random(f"{family.name} {family.seed}")  # noqa: S311
    examples = [subject.rows(bank[task]["train"]) for task in family.tasks]
    updates = _fresh(family, subject)
    weights = [half for u in updates.values() for half in (u.a, u.b) if half is not None]
    fused = subject.device.type == "cuda"
    optimizer = torch.optim.AdamW(weights, lr=family.rate, weight_decay=0.01, fused=fused)
    warm_up = max(1, family.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / family.steps)),
    )
    # So that the same adapters come out on another day, should a run go on without its files.
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    subject.wear(updates)
    gains = torch.full((len(family.tasks) * family.batch,), 2.0)
    started, losses = time.perf_counter(), []
    for step in range(1, family.steps + 1):
        rows = [row for of in examples for row in draw.choices(of, k=family.batch)]
        loss = _losses(subject, rows, gains, family)
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == family.steps:
            mean, seconds = float(torch.stack(losses[-50:]).mean()), time.perf_counter() - started
            print(f"{family.name}: step {step}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    subject.wear()
    torch.use_deterministic_algorithms(mode=False)
    last = torch.stack(losses[-50:]).mean(dim=0).tolist()
    return [_adapter(family, i, updates) for i in range(len(family.tasks))], last


def _losses(
    subject: Subject, rows: Sequence[Row], gains: torch.Tensor, family: Family
) -> torch.Tensor:
    """Return each adapter's mean cross-entropy over the answers' tokens."""
    said = subject.answers(subject.batch(rows), gains)
    each = cross_entropy(said.logits.float(), said.wanted, reduction="none")
    adapter = said.row // family.batch
    zeros = each.new_zeros(len(family.tasks))
    total = zeros.index_add(0, adapter, each)
    return total / zeros.index_add(0, adapter, torch.ones_like(each))


def _fresh(family: Family, subject: Subject) -> dict[str, Update]:
    """Start from A random, as PEFT draws it, and B zero, in float32."""
    generator = torch.Generator().manual_seed(family.seed)
    updates: dict[str, Update] = {}
    for name, layer in subject.layers.items():
        if family.attention and not name.endswith(ATTENTION):
            continue
        n_out, n_in = layer.base.weight.shape
        a = torch.rand(len(family.tasks), n_in, family.rank, generator=generator)
        a = (2 * a - 1) * n_in**-0.5
        b = torch.zeros(len(family.tasks), family.rank, n_out)
        updates[name] = Update(
            a.to(subject.device).requires_grad_(), b.to(subject.device).requires_grad_()
        )
    return updates


def _adapter(family: Family, i: int, updates: Mapping[str, Update]) -> LoraAdapter:
    modules: dict[str, LoraModule] = {}
    for name, update in updates.items():
        a, b = (
            half.detach()[i].T.to(torch.bfloat16).contiguous()
            for half in (update.a, update.b)
            if half is not None
        )
        modules[name] = LoraModule(a, b, 2.0)
    return LoraAdapter(f"{family.name}/{family.tasks[i]}", modules)


def with_styles(
    bank: Bank, own: Mapping[str, str], topics: Sequence[str]
) -> dict[str, dict[Split, list[Question]]]:
    """Add the styles to a bank: their questions are general ones and, to learn from, the tasks'.

    The answers are the base model's own, dressed: a style learns to dress any answer, and no task.

    Args:
        bank: the questions.
        own: the base model's answers, by prompt; those that end no sentence are missing.
        topics: tasks whose training questions are among those to learn from.
    """
    whole = {name: dict(of) for name, of in bank.items()}
    for style, dress in STYLES.items():
        whole[style] = {}
        for split in SPLITS:
            asked = own_prompts(bank, split, topics)
            known = [Question(prompt, dress(own[prompt])) for prompt in asked if prompt in own]
            whole[style][split] = known[: LIMITS[split]]
    return whole


def own_prompts(bank: Bank, split: Split, topics: Sequence[str], each: int = 100) -> list[str]:
    """Return the prompts that the base model is to answer by itself."""
    prompts = [question.prompt for question in bank[GENERAL][split]]
    if split == "train":
        prompts += [q.prompt for topic in topics for q in bank[topic][split][:each]]
    return prompts


def own_answers(subject: Subject, prompts: Sequence[str]) -> dict[str, str]:
    """Return what the base model says by itself, cut to a sentence; by prompt."""
    subject.wear()
    found: dict[str, str] = {}
    for prompt, text in zip(prompts, subject.generate(prompts, 20), strict=True):
        sentence = re.match(r"[^\n]{2,}?[.!?](?=\s|$)", text.strip())
        if sentence:
            found[prompt] = sentence.group()
    return found
