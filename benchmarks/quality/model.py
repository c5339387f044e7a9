"""The base model, and low-rank or dense updates that it wears without being changed.

Several adapters of one shape are worn at once: the rows of a batch are shared out among them in
equal parts, which trains and scores them together at nearly the price of one. Every row has its
own gain, so one batch asks the same questions at many scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.tasks import Question
from lego_core import LoraAdapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one layer adds to its output: x @ a @ b, or x @ a where b is None.

    Attributes:
        a: shape [T, in, rank], or [1, in, out] of a dense update.
        b: shape [T, rank, out].
    """

    a: torch.Tensor
    b: torch.Tensor | None = None

    def to(self, device: torch.device) -> Update:
        """Return it on a device, itself if it is there."""
        return Update(self.a.to(device), None if self.b is None else self.b.to(device))


@dataclass(frozen=True, slots=True)
class Row:
    """A tokenised question: the ids of prompt and answer, and where the answer begins."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows as tensors, padded on the right, where causal attention never looks.

    Attributes:
        ids: shape [rows, tokens].
        due: whether a token is part of an answer, shape [rows, tokens].
    """

    ids: torch.Tensor
    due: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row, shape [rows]."""
        place = torch.arange(1, self.due.shape[1] + 1, device=self.due.device)
        return (self.due * place).amax(dim=1)

    def take(self, index: torch.Tensor, longest: int) -> Batch:
        """Return these rows, none of which is longer than `longest`."""
        return Batch(self.ids[index, :longest], self.due[index, :longest])


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What the model says where an answer's tokens are due, given the right tokens before them.

    Attributes:
        logits: shape [tokens, vocabulary].
        wanted: the right token ids, shape [tokens].
        row: to which row of the batch each belongs, shape [tokens].
    """

    logits: torch.Tensor
    wanted: torch.Tensor
    row: torch.Tensor


class WearingLinear(nn.Module):
    """A frozen linear layer and the update that it wears."""

    def __init__(self, base: nn.Linear, subject: Subject) -> None:
        super().__init__()
        self.base = base
        self.update: Update | None = None
        self._subject = (subject,)  # in a tuple, lest it become a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x [rows, tokens, in], the rows of each adapter next to each other."""
        y: torch.Tensor = self.base(x)
        if self.update is None:
            return y
        a, b = self.update.a.to(x.dtype), self.update.b
        grouped = x.reshape(len(a), -1, x.shape[-1])
        units = (grouped @ a).view(*x.shape[:-1], -1) * self._subject[0].gains
        if b is None:
            return y + units
        units = units.view(len(a), -1, units.shape[-1])
        return torch.baddbmm(y.view(len(a), -1, y.shape[-1]), units, b.to(x.dtype)).view_as(y)


class Subject:
    """A causal language model in what it wears.

    Args:
        model: of Hugging Face; its linear layers but the head are replaced.
        tokenizer: with ChatML's marks.
        device: where it lies.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.device = device
        self.gains = torch.ones(1, 1, 1, device=device, dtype=model.dtype)
        self.layers: dict[str, WearingLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, leaf = name.rpartition(".")
                self.layers[name] = WearingLinear(module, self)
                setattr(model.get_submodule(parent), leaf, self.layers[name])

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Subject:
        """Load a Hugging Face folder, in bfloat16 on a GPU, in float32 on the CPU."""
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # its file names none
        return cls(model, tokenizer, device)

    def wear(self, updates: Mapping[str, Update] | None = None) -> None:
        """Put these updates on, by layer, for those worn before."""
        for name, layer in self.layers.items():
            update = (updates or {}).get(name)
            layer.update = update and update.to(self.device)

    def weight_norms(self) -> dict[str, float]:
        """Return the Frobenius norm of every layer's own weight."""
        return {
            name: float(layer.base.weight.float().norm()) for name, layer in self.layers.items()
        }

    def rows(self, questions: Sequence[Question]) -> list[Row]:
        """Tokenise questions with their answers, each a chat of one turn that ends.

        The default system message of the model's template is left out: it would be half of all
        tokens.
        """
        prompts = self._tokens([self._chat(question.prompt) for question in questions])
        end = self.tokenizer.eos_token
        answers = self._tokens([question.answer + end for question in questions])
        return [
            Row((*prompt, *answer), len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pad rows to the longest."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + (0,) * (longest - len(row.ids)) for row in rows])
        place = torch.arange(longest)
        first = torch.tensor([row.start for row in rows])[:, None]
        end = torch.tensor([len(row.ids) for row in rows])[:, None]
        due = (first <= place) & (place < end)
        return Batch(ids.to(self.device), due.to(self.device))

    def answers(self, batch: Batch, gains: torch.Tensor) -> Answers:
        """Run a batch once.

        Args:
            batch: the rows of each adapter worn next to each other, in equal parts.
            gains: of the updates, shape [rows].
        """
        self.gains = gains.to(self.gains)[:, None, None]
        hidden = self.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        row, place = batch.due.nonzero().unbind(1)
        logits = self.model.lm_head(hidden[row, place - 1])
        return Answers(logits, batch.ids[row, place], row)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], new_tokens: int, batch: int = 512) -> list[str]:
        """Decode greedily, in batches."""
        self.gains = torch.ones_like(self.gains[:1])
        texts: list[str] = []
        for first in range(0, len(prompts), batch):
            rows = self._tokens([self._chat(prompt) for prompt in prompts[first : first + batch]])
            inputs = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
            output = self.model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            said = output[:, inputs["input_ids"].shape[1] :]
            texts += self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return texts

    def _chat(self, prompt: str) -> str:
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])


def worn(adapters: Sequence[LoraAdapter]) -> dict[str, Update]:
    """Stack adapters of the same layers and rank, to be worn at once."""
    return {
        name: Update(
            torch.stack([a.modules[name].lora_a.T for a in adapters]),
            torch.stack([a.modules[name].lora_b.T * a.modules[name].scaling for a in adapters]),
        )
        for name in adapters[0].modules
    }
