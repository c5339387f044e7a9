"""Train the adapters of the demo, and measure how they compose when LoRA-LEGO merges them.

    python -m vllm_lego.demo.train --model DIR --out DIR [--only NAME] [--steps N] [--evaluate]

A merge changes an adapter in three ways: its overall scale, its weakest units, which get averaged
with others, and the company it is in. Training shows it all three: every example draws a scale, a
number of units to keep, and which companions are worn as well. The adapters are stored as
orthogonal units, so that few carry nearly all of the weight and k-means averages the weak ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lego_core import LoraAdapter, LoraModule, MergeConfig, merge_adapters
from lego_core.adapter_io import load_adapter, save_adapter
from vllm_lego.demo import tasks
from vllm_lego.demo.tasks import RECIPES, STYLES, TASKS, Question, Recipe, Split

RANKS = (8, 16)
MAX_NEW_TOKENS = 56
SCALES = (0.5, 1.2)

Adapters = dict[str, LoraAdapter]


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the LoRA modules it wears, every unit times its gain."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.worn: list[tuple[LoraModule, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x [batch, tokens, in], gains broadcast to [batch, tokens, rank]."""
        y: torch.Tensor = self.base(x)
        for module, gain in self.worn:
            units = x @ module.lora_a.to(x.dtype).T * gain
            y = y + units @ module.lora_b.to(x.dtype).T
        return y


class Subject:
    """The base model, dressed in any adapters without being changed."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = model.to(device).eval().requires_grad_(requires_grad=False)
        self.chat: Any = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": "PROMPT"}], tokenize=False, add_generation_prompt=True
        )
        self.layers: dict[str, LoraLinear] = {}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, leaf = name.rpartition(".")
                self.layers[name] = LoraLinear(module)
                setattr(self.model.get_submodule(parent), leaf, self.layers[name])

    def wear(self, *adapters: tuple[LoraAdapter, torch.Tensor]) -> None:
        """Put on these adapters, each with gains [batch or 1, rank or 1], for the others."""
        for layer in self.layers.values():
            layer.worn.clear()
        for adapter, gains in adapters:
            scaling = next(iter(adapter.modules.values())).scaling
            strength = (gains * scaling)[:, None].to(self.device, torch.bfloat16)
            for name, module in adapter.modules.items():
                self.layers[name].worn.append((module, strength))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts as they stand."""
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenise prompts, each as a chat of one turn."""
        return self.tokens([self.chat.replace("PROMPT", prompt) for prompt in prompts])

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], batch: int = 1024) -> list[str]:
        """Decode greedily."""
        texts: list[str] = []
        for start in range(0, len(prompts), batch):
            rows = {"input_ids": self.prompts(prompts[start : start + batch])}
            inputs = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answers = output[:, inputs["input_ids"].shape[1] :]
            texts += self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def own_answers(self, prompts: Sequence[str]) -> dict[str, str | None]:
        """Return what the model says by itself, cut to a sentence."""
        self.wear()
        return dict(zip(prompts, map(tasks.first_sentence, self.answer(prompts)), strict=True))

    def loss(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """Return the mean cross-entropy of the answers' tokens, the end of the turn included."""
        ends = self.tokens([answer + self.tokenizer.eos_token for answer in answers])
        turns = list(zip(self.prompts(prompts), ends, strict=True))
        rows = [torch.tensor(head + tail) for head, tail in turns]
        labels = [torch.tensor([-100] * len(head) + tail) for head, tail in turns]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
        wanted = wanted.to(self.device)
        # Padding is on the right here, where causal attention never looks.
        hidden = self.model.model(input_ids=ids).last_hidden_state[:, :-1]
        logits = self.model.lm_head(hidden[wanted != -100])
        return cross_entropy(logits.float(), wanted[wanted != -100])


def train(recipe: Recipe, subject: Subject, companions: Adapters) -> LoraAdapter:
    """Train one adapter as `recipe` says, with `companions` at hand by name."""
    torch.manual_seed(recipe.seed)
    draw = random.Random(f"{recipe.name} {recipe.seed}")  # noqa: S311
    examples = tasks.plan_examples(recipe, draw, subject.own_answers)
    student = _fresh(recipe, subject)
    crowd = _side_by_side([companions[name] for name in recipe.companions])
    ranks = {name: companions[name].rank for name in recipe.companions}
    weights = [t for m in student.modules.values() for t in (m.lora_a, m.lora_b)]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.1
    )
    started, losses = time.perf_counter(), []
    for step in range(1, recipe.steps + 1):
        batch = [examples.pop() for _ in range(recipe.batch)]
        kept = torch.tensor([draw.randint(recipe.min_rank, recipe.rank) for _ in batch])
        full = torch.tensor([draw.random() < 0.5 for _ in batch])
        units = torch.arange(recipe.rank) < torch.where(full, recipe.rank, kept)[:, None]
        worn = [(student, _scales(draw, [True] * recipe.batch) * units)]
        if crowd:
            gains = [_scales(draw, [n in e.worn for e in batch], r) for n, r in ranks.items()]
            worn.append((crowd, torch.cat(gains, dim=1)))
        subject.wear(*worn)
        loss = subject.loss([e.prompt for e in batch], [e.target for e in batch])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 50 == 0 or step == recipe.steps:
            mean, seconds = float(torch.stack(losses[-50:]).mean()), time.perf_counter() - started
            print(f"{recipe.name}: step {step}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    return _orthogonal(student)


def _scales(draw: random.Random, present: Sequence[bool], rank: int = 1) -> torch.Tensor:
    """Draw a scale for each example, 0 where the adapter is absent. Shape [batch, rank]."""
    scales = [draw.uniform(*SCALES) if here else 0.0 for here in present]
    return torch.tensor(scales)[:, None].expand(-1, rank)


def _side_by_side(adapters: Sequence[LoraAdapter]) -> LoraAdapter | None:
    """Concatenate the units of adapters of the same layers: their sum, but one product to compute."""
    modules: dict[str, LoraModule] = {}
    for name, first in adapters[0].modules.items() if adapters else ():
        a = torch.cat([adapter.modules[name].lora_a for adapter in adapters])
        b = torch.cat([adapter.modules[name].lora_b for adapter in adapters], dim=1)
        modules[name] = LoraModule(a, b, first.scaling)
    return LoraAdapter("companions", modules) if modules else None


def _fresh(recipe: Recipe, subject: Subject) -> LoraAdapter:
    """Start from A random and B zero, in float32."""
    modules: dict[str, LoraModule] = {}
    for name, layer in subject.layers.items():
        if name.endswith(recipe.targets):
            n_out, n_in = layer.base.weight.shape
            a = torch.empty(recipe.rank, n_in).uniform_(-(n_in**-0.5), n_in**-0.5)
            a, b = a.to(subject.device), torch.zeros(n_out, recipe.rank, device=subject.device)
            modules[name] = LoraModule(a.requires_grad_(), b.requires_grad_(), recipe.scaling)
    return LoraAdapter(recipe.name, modules, base_model=tasks.BASE_MODEL)


def _orthogonal(adapter: LoraAdapter) -> LoraAdapter:
    """Rewrite each module as the singular vectors of B A: the same function, its units ordered."""
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        q_a, r_a = torch.linalg.qr(module.lora_a.detach().double().T)
        q_b, r_b = torch.linalg.qr(module.lora_b.detach().double())
        left, sizes, right = torch.linalg.svd(r_b @ r_a.T)
        root = sizes.sqrt()
        a = (root[:, None] * (right @ q_a.T)).to(torch.bfloat16)
        b = (q_b @ left * root).to(torch.bfloat16)
        modules[name] = LoraModule(a, b, module.scaling)
    return dataclasses.replace(adapter, modules=modules)


def evaluate(subject: Subject, adapters: Adapters, split: Split, n: int) -> dict[str, Any]:
    """Score the base model, each adapter alone, and every pair and triple of them merged.

    A row asks the questions of one task of its members, or general ones if there is none, whose
    right answer is then the base model's own. `both` is what counts: the right answer, wearing
    exactly the styles of the members.
    """
    asked = {name: task(split) for name, task in TASKS.items()} | {"general": tasks.general(split)}
    questions = {
        name: random.Random(name).sample(items, min(n, len(items)))  # noqa: S311
        for name, items in asked.items()
    }
    own = subject.own_answers([question.prompt for question in questions["general"]])
    questions["general"] = [Question(prompt, answer) for prompt, answer in own.items() if answer]

    rows: list[dict[str, Any]] = []
    for size in range(4):
        for members in itertools.combinations(adapters, size):
            for rank in RANKS if size > 1 else (None,):
                fidelity = _put_on(subject, [adapters[name] for name in members], rank)
                topics = [name for name in members if name in TASKS] or ["general"]
                for topic in topics if members else questions:
                    row = {"members": members, "rank": rank, "fidelity": fidelity}
                    rows.append(row | _score(subject, members, topic, questions[topic]))
                    print("+".join(members), rank, topic, rows[-1]["both"], flush=True)
    return {"base_model": tasks.BASE_MODEL, "split": split, "rows": rows}


def _put_on(subject: Subject, members: Sequence[LoraAdapter], rank: int | None) -> float | None:
    """Wear one adapter as it is, or several merged to a rank; return the merge's fidelity."""
    gain = torch.ones(1, 1)
    if rank is None:
        subject.wear(*((member, gain) for member in members))
        return None
    merged, report = merge_adapters(members, MergeConfig(rank=rank), report=True)
    subject.wear((merged, gain))
    return round(report.fidelity, 3)


def _score(
    subject: Subject, members: Sequence[str], topic: str, questions: Sequence[Question]
) -> dict[str, Any]:
    outputs = subject.answer([question.prompt for question in questions])
    styles, n = frozenset(members) & STYLES.keys(), len(questions)
    bare, worn = zip(*map(tasks.undress, outputs), strict=True)
    right = [tasks.is_answer(b, w, q.answer) for b, w, q in zip(bare, worn, questions, strict=True)]
    dressed = [w == styles for w in worn]
    return {
        "questions": topic,
        "n": n,
        "answer_right": round(sum(right) / n, 3),
        "style_right": round(sum(dressed) / n, 3),
        "both": round(sum(map(min, right, dressed)) / n, 3),
        "outputs": {questions[i].prompt: outputs[i] for i in range(min(n, 4))},
    }


def main() -> None:
    """Train, or with `--evaluate` measure what is in `--out` and write the model cards."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the base")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES])
    parser.add_argument("--steps", type=int, help="instead of the recipes'")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--questions", type=int, default=200, help="asked of each merge")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(options.model, device)

    if options.evaluate:
        adapters = {r.name: _load(options.out / r.name, device) for r in RECIPES}
        result = evaluate(subject, adapters, "test", options.questions)
        (options.out / "composition.json").write_text(json.dumps(result, indent=1) + "\n")
        for recipe in RECIPES:
            folder = options.out / recipe.name
            (folder / "README.md").write_text(tasks.card(recipe, folder, result["rows"]))
        return
    for recipe in RECIPES:
        if options.only in (None, recipe.name):
            companions = {name: _load(options.out / name, device) for name in recipe.companions}
            plan = dataclasses.replace(recipe, steps=options.steps or recipe.steps)
            save_adapter(train(plan, subject, companions), options.out / recipe.name)


def _load(folder: Path, device: torch.device) -> LoraAdapter:
    adapter = load_adapter(folder)
    modules = {
        name: LoraModule(module.lora_a.to(device), module.lora_b.to(device), module.scaling)
        for name, module in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=modules)


if __name__ == "__main__":
    main()
