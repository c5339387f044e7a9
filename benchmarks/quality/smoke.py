"""A language model of two small layers, and questions it can half learn: to see that all runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.quality.experiments import Plan
from benchmarks.quality.model import Subject
from benchmarks.quality.tasks import GENERAL, LIMITS, SPLITS, split_of
from benchmarks.quality.training import Family

TASKS = ("sentiment", "speech")  # by name only: their questions here are simpler ones
PLAN = Plan(
    families=(
        Family("r4-all", (*TASKS, "json", "shout"), 4, 1e-2, 200, 1, batch=8),
        Family("r2-attention", TASKS, 2, 1e-2, 200, 2, attention=True, batch=8),
        Family("r2-all", TASKS, 2, 1e-2, 200, 3, batch=8),
    ),
    sizes=(2,),
    draws={"r4-all": 1, "r2-attention": 1},
    few=1,
    ranks=(2, 8),
    mixed=("r4-all", "r2-all"),
    cuts=(1, 2),
    composed=(TASKS[0],),
)


def tiny_subject() -> Subject:
    """Return a random Llama that reads and writes bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - slow
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side="left", **marks)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # no padding: its embedding would be zero
    )
    return Subject(LlamaForCausalLM(config), tokenizer, torch.device("cpu"))


def write_questions(work: Path) -> None:
    """Lay out questions and the base model's answers as the full benchmark would."""
    asked = {
        TASKS[0]: [(str(n), f"Is {n} even?", "no" if n % 2 else "yes") for n in range(300)],
        TASKS[1]: [(str(n), f"{n} is", "odd" if n % 2 else "even") for n in range(300)],
        GENERAL: [(str(n), f"Say {n}", "") for n in range(300)],
    }
    limit = {split: min(limit, 40) for split, limit in LIMITS.items()}
    questions = {
        name: {
            split: [[p, a] for item, p, a in items if split_of(item) == split][: limit[split]]
            for split in SPLITS
        }
        for name, items in asked.items()
    }
    prompts = {
        prompt: "yes" for of in questions.values() for pairs in of.values() for prompt, _ in pairs
    }
    work.mkdir(parents=True, exist_ok=True)
    (work / "questions.json").write_text(json.dumps({"versions": {}, "questions": questions}))
    (work / "own_answers.json").write_text(json.dumps(prompts))
