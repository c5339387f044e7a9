"""The quality benchmark asks what it says, scores what greedy decoding gives, and runs."""

from __future__ import annotations

import calendar
import datetime as dt
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import figures, tasks
from benchmarks.quality.evaluation import hits, wilson
from benchmarks.quality.merging import Members, Variant, frobenius, make
from benchmarks.quality.model import Subject, Update, worn
from benchmarks.quality.smoke import PLAN, tiny_subject
from benchmarks.quality.tasks import TASKS, Question
from benchmarks.quality.training import Family, train
from lego_core import LoraAdapter, LoraModule

LETTERS = dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
UNITS += "fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: n for n, word in enumerate(UNITS.split())}
WORDS |= {word: 10 * n for n, word in enumerate(TENS.split(), 2)}


def value_of_roman(text: str) -> int:
    values = [LETTERS[letter] for letter in text]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


def value_of_words(text: str) -> int:
    total = group = 0
    for word in text.replace(",", "").replace("-", " ").split():
        if word == "thousand":
            total, group = 1000 * group, 0
        elif word == "hundred":
            group *= 100
        elif word != "and":
            group += WORDS[word]
    return total + group


def value_of_date(text: str) -> dt.date:
    day, month, year = text.split()
    return dt.date(int(year), list(calendar.month_name).index(month), int(day))


CHECKS = {
    "numbers": lambda item, answer: value_of_words(answer) == int(item),
    "roman": lambda item, answer: value_of_roman(answer) == int(item),
    "dates": lambda item, answer: value_of_date(answer) == dt.date.fromisoformat(item),
    "sums": lambda item, answer: int(answer) == sum(map(int, item.split(" + "))),
    "spelling": lambda item, answer: answer.replace("-", "") == item and answer[1] == "-",
    "sorting": lambda item, answer: (
        sorted(item.split(", ")) == answer.split(", ") and len(set(item.split(", "))) == 4
    ),
    "plurals": lambda item, answer: answer != item and item.isalpha(),
    "past": lambda item, answer: answer.isalpha() and item.isalpha(),
    "continents": lambda item, answer: answer in tasks.CONTINENTS.values(),
    "syllables": lambda item, answer: 1 <= int(answer) <= 9,
    "sentiment": lambda item, answer: answer in {"positive", "negative"},
    "speech": lambda item, answer: answer in {"noun", "verb", "adjective"},
}


def items_of(name: str) -> list[tuple[str, str]]:
    try:
        return list(TASKS[name].items())
    except ImportError as missing:
        pytest.skip(f"{missing}; it comes with the extra `train`")


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right_and_enough(name):
    items = items_of(name)
    assert all(CHECKS[name](*item) for item in items)
    assert len({item for item, _ in items}) == len(items)
    found = dict.fromkeys(tasks.SPLITS, 0)
    for item, _ in items:
        found[tasks.split_of(item)] += 1
    assert all(found[split] >= least for split, least in (("validation", 100), ("test", 200)))


def test_splits_are_disjoint_and_do_not_change():
    found = [tasks.split_of(str(n)) for n in range(12)]
    assert found == FIRST
    bank = {name: tasks._split(name, items_of(name), "{}") for name in ("roman", "dates", "sums")}
    again = {name: tasks._split(name, items_of(name), "{}") for name in ("roman", "dates", "sums")}
    assert bank == again
    for splits in bank.values():
        prompts = [question.prompt for questions in splits.values() for question in questions]
        assert len(set(prompts)) == len(prompts)
        assert [len(splits[split]) for split in ("validation", "test")] == [100, 200]


FIRST = [
    "test",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "test",
    "train",
    "test",
    "test",
    "train",
]


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so little work, threads only wait for each other
    yield tiny_subject()
    torch.set_num_threads(threads)


QUESTIONS = [Question(f"Is {n} even?", "no" if n % 2 else "yes") for n in range(60)]


@pytest.fixture(scope="module")
def trained(subject) -> LoraAdapter:
    family = Family("tiny", ("parity",), rank=4, rate=1e-2, steps=120, seed=1, batch=8)
    bank: Any = {"parity": {"train": QUESTIONS}}
    (adapter,), (loss,) = train(family, subject, bank)
    assert loss < 1.5  # it starts above 5
    return adapter


def test_a_teacher_forced_match_is_what_greedy_decoding_gives(subject, trained):
    subject.wear(worn([trained]))
    exam = subject.batch(subject.rows(QUESTIONS))
    decoded = subject.generate([q.prompt for q in QUESTIONS], 8)
    given = [text == q.answer for text, q in zip(decoded, QUESTIONS, strict=True)]
    assert hits(subject, exam)[0].tolist() == given
    assert 0 < sum(given) < len(given)  # some right, some wrong, or this shows nothing


def test_a_single_wrong_token_is_no_match(subject, trained):
    subject.wear(worn([trained]))
    said = subject.generate([q.prompt for q in QUESTIONS], 8)
    right = [Question(q.prompt, text) for q, text in zip(QUESTIONS, said, strict=True)]
    assert hits(subject, subject.batch(subject.rows(right))).all()
    wrong = [replace(q, answer=q.answer + "!") for q in right]
    assert not hits(subject, subject.batch(subject.rows(wrong))).any()


def adapter_of(subject: Subject, seed: int, rank: int = 3) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, layer in subject.layers.items():
        n_out, n_in = layer.base.weight.shape
        a = torch.randn(rank, n_in, generator=generator) / 8
        modules[name] = LoraModule(a, torch.randn(n_out, rank, generator=generator) / 8, 2.0)
    return LoraAdapter(f"random-{seed}", modules, digest=str(seed))


def test_adapters_worn_at_once_are_as_each_alone(subject):
    adapters = [adapter_of(subject, 1), adapter_of(subject, 2)]
    rows = subject.rows(QUESTIONS[:4])
    subject.wear(worn(adapters))
    gains = torch.tensor([0.5, 1.0, 1.0, 1.0] * 2)
    together = subject.answers(subject.batch(rows * 2), gains)
    for i, adapter in enumerate(adapters):
        subject.wear(worn([adapter]))
        alone = subject.answers(subject.batch(rows), gains[:4])
        mine = together.logits[together.row // 4 == i]
        torch.testing.assert_close(mine, alone.logits, rtol=1e-4, atol=1e-4)


def test_a_gain_is_a_factor_on_the_update(subject):
    adapter = adapter_of(subject, 3)
    batch = subject.batch(subject.rows(QUESTIONS[:3]))
    subject.wear(worn([adapter]))
    scaled = subject.answers(batch, torch.full((3,), 0.25)).logits
    dense = {
        name: Update((0.25 * module.delta()).T[None]) for name, module in adapter.modules.items()
    }
    subject.wear(dense)
    torch.testing.assert_close(
        scaled, subject.answers(batch, torch.ones(3)).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", ["ties, dense", "dare_ties, dense", "svd", "concat"])
def test_what_is_known_of_a_merge_is_that_of_its_dense_updates(subject, method):
    adapters = [adapter_of(subject, seed) for seed in (4, 5)]
    members = Members.of(adapters)
    merge = make(Variant(method, method, bound=True), members, 3)
    dense = {
        name: (u.a[0] if u.b is None else u.a[0] @ u.b[0]).T for name, u in merge.updates.items()
    }
    total = {name: sum(a.modules[name].delta() for a in adapters) for name in dense}
    norm, whole = (
        math.sqrt(sum(float(d.square().sum()) for d in of.values())) for of in (dense, total)
    )
    overlap = sum(float((dense[name] * total[name]).sum()) for name in dense)
    assert merge.norm == pytest.approx(norm, rel=1e-4)
    assert members.sum_norm == pytest.approx(whole, rel=1e-4)
    assert merge.fidelity == pytest.approx(overlap / norm / whole, rel=1e-4)
    assert members.norms[0] == pytest.approx(frobenius(adapters[0]))
    # Dense DARE keeps all the sum in expectation; TIES without a cut is a fifth of the entries.
    assert merge.fidelity > (0.999 if method in {"svd", "concat"} else 0.3)


def test_wilsons_interval():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_kept_accuracy_and_its_interval():
    single = {"validation": "1111", "test": "1" * 80 + "0" * 20}
    merged = {
        "test": {"0.5": ["1" * 40 + "0" * 60]},
        "exams": ["roman"],
        "singles": ["single|roman"],
    }
    kept = figures.interval(figures.test_figure(merged, {"single|roman": single}, 0.5))
    assert kept["value"] == pytest.approx(0.5)
    assert 0.35 < kept["low"] < 0.45
    assert 0.55 < kept["high"] < 0.65


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def test_smoke_run_has_finite_figures(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", "--smoke", "--out", tmp_path],
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=500,
    )
    results = json.loads((tmp_path / "quality.json").read_text())
    assert results["finished"]
    assert all(math.isfinite(number) for number in numbers(results))
    trained = {row["adapter"] for row in results["adapters"]} - {"base"}
    assert len(trained) == sum(len(family.tasks) for family in PLAN.families)
    assert all(row["relative_norm"] > 0 for row in results["adapters"] if "rank" in row)
    for experiment, rows in results["tables"].items():
        assert rows, experiment
        assert all(0 <= row["best"]["low"] <= row["best"]["value"] for row in rows)
    assert results["goal"]
    lines = (tmp_path / "merges.jsonl").read_text().splitlines()
    assert all(math.isfinite(number) for line in lines for number in numbers(json.loads(line)))
    assert len(lines) == sum(row["merges"] for rows in results["tables"].values() for row in rows)
    assert "| lego |" in (tmp_path / "quality.md").read_text()
