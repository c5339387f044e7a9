"""The experiments: which sets are merged how, and what the merges then answer.

An experiment is a list of jobs, a job one merge with its scores; all jobs are scored alike. Every
finished job is one line of a file, and a job that is there is not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.quality.evaluation import hits, packed, unpacked
from benchmarks.quality.merging import (
    LEGO,
    Members,
    Merge,
    Variant,
    ablation,
    bounds,
    competitors,
    frobenius,
    make,
    make_elsewhere,
    scale_rules,
    taken,
)
from benchmarks.quality.model import Batch, Subject, worn
from benchmarks.quality.tasks import STYLES, TASKS, Bank, Question, Split
from benchmarks.quality.training import Family
from lego_core import LoraAdapter

CANDIDATES = (*LEGO, "svd")
"""Variants that are asked the test split's questions at every scale, in the multi-task experiment."""

LEARNT = 0.3
"""An adapter below this validation score has learnt too little for a share of it to mean much."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done.

    Attributes:
        families: what is trained; the first is what most experiments merge.
        sizes: of the sets of the multi-task experiment.
        draws: sets of each size, by family.
        few: sets of each size in the ablation and in the sweep over k.
        ranks: k of that sweep.
        mixed: families whose adapters of different ranks are merged together.
        cuts: k that one adapter is pruned to.
        composed: tasks that are asked with every style.
    """

    families: tuple[Family, ...]
    sizes: tuple[int, ...]
    draws: Mapping[str, int]
    few: int
    ranks: tuple[int, ...]
    mixed: tuple[str, ...]
    cuts: tuple[int, ...]
    composed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One merge and what it is asked.

    Attributes:
        experiment: that it belongs to.
        members: adapters by name.
        exams: what is asked, by name.
        variant: how to merge.
        rank: k.
    """

    experiment: str
    members: tuple[str, ...]
    exams: tuple[str, ...]
    variant: Variant
    rank: int

    @property
    def key(self) -> str:
        """What tells it from all other jobs."""
        return "|".join([self.experiment, *self.members, self.variant.label, str(self.rank)])


@dataclass(eq=False)
class Bench:
    """What the jobs work with, and the file that keeps their results."""

    subject: Subject
    bank: Bank
    folder: Path
    adapters: Mapping[str, LoraAdapter]
    file: Path
    deadline: float
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            whole, _, torn = self.file.read_text().rpartition("\n")
            if torn:  # by a run that was killed
                self.file.write_text(whole and whole + "\n")
            found = map(json.loads, whole.splitlines())
            self.records = {record["key"]: record for record in found}
            for name, adapter in self.adapters.items():
                if (
                    self.records.get(f"single|{name}", {}).get("digest", adapter.digest)
                    != adapter.digest
                ):
                    raise SystemExit(
                        f"{self.file} was made with another {name} than that in {self.folder}: move "
                        "the file away, or bring its adapters back"
                    )
        self.exam = lru_cache(maxsize=None)(self._exam)
        self.members = lru_cache(maxsize=16)(self._members)

    def keep(self, record: dict[str, Any]) -> None:
        """Write a result down."""
        line = json.dumps(record)
        self.records[record["key"]] = json.loads(line)  # as it will be read again
        with self.file.open("a") as file:
            file.write(line + "\n")

    @property
    def is_late(self) -> bool:
        """Whether nothing new is to be begun."""
        return time.monotonic() > self.deadline

    def share(self, adapter: str) -> float:
        """Return a single adapter's validation score."""
        bits = unpacked(self.records[f"single|{adapter}"]["validation"])
        return sum(bits) / len(bits)

    def _exam(self, name: str, split: Split) -> Batch:
        """Tokenise an exam: a task's or style's questions, or `task as style`."""
        task, _, style = name.partition(" as ")
        questions: Sequence[Question] = self.bank[task][split]
        if style:
            questions = [Question(q.prompt, STYLES[style](q.answer)) for q in questions]
        return self.subject.batch(self.subject.rows(questions))

    def _members(self, names: tuple[str, ...]) -> Members:
        return Members.of([self.adapters[name] for name in names])


def score_singles(bench: Bench) -> None:
    """Score the base model on every exam, and each adapter on its own."""
    weights = bench.subject.weight_norms()
    todo: list[tuple[str, str]] = [
        ("base", task) for task in (*TASKS, *STYLES) if task in bench.bank
    ]
    todo += [(name, name.partition("/")[2]) for name in bench.adapters]
    for name, task in todo:
        key = f"base|{task}" if name == "base" else f"single|{name}"
        if key in bench.records or bench.is_late:
            continue
        record: dict[str, Any] = {"key": key, "experiment": "single", "adapter": name, "task": task}
        bench.subject.wear()
        if name != "base":
            adapter = bench.adapters[name]
            bench.subject.wear(worn([adapter]))
            norm = frobenius(adapter)
            own = sum(weights[layer] ** 2 for layer in adapter.modules) ** 0.5
            record |= {
                "rank": adapter.rank,
                "norm": norm,
                "relative_norm": norm / own,
                "digest": adapter.digest,
            }
        for split in ("validation", "test"):
            record[split] = packed(hits(bench.subject, bench.exam(task, split))[0])
        bench.keep(record)


def jobs(bench: Bench, plan: Plan) -> Iterator[Job]:
    """All jobs, what matters most first; what works entry by entry, and takes long, last."""
    every = [*competitors(), *bounds(), *scale_rules()]
    slow = [variant for variant in every if variant.is_slow]
    yield from _multi_task(bench, plan, [variant for variant in every if not variant.is_slow])
    yield from _one_thing_varied(bench, plan)
    yield from _mixed_ranks(bench, plan, every)
    yield from _composition(bench, plan, [variant for variant in every if not variant.is_slow])
    yield from _multi_task(bench, plan, slow)


def _multi_task(bench: Bench, plan: Plan, variants: Sequence[Variant]) -> Iterator[Job]:
    for family in plan.families:
        for size in plan.sizes:
            for names in draw(bench, family, size, plan.draws.get(family.name, 0)):
                for variant in variants:
                    yield _job("multi-task", names, variant, family.rank)


def _one_thing_varied(bench: Bench, plan: Plan) -> Iterator[Job]:
    """The ablation, the sweep over k, and one adapter pruned to k."""
    first = plan.families[0]
    sets = [names for size in plan.sizes for names in draw(bench, first, size, plan.few)]
    swept = [variant for variant in competitors() if variant.method in (*LEGO, "svd")]
    for names in sets:
        for k in (first.rank, 2 * first.rank):
            for variant in ablation():
                # At k = r the output's reweighting is a factor of 1.
                if k != first.rank or variant.options.get("output_reweighting", True):
                    yield _job("ablation", names, variant, k)
    for names in sets:
        for k in plan.ranks:
            yield from (_job("k", names, variant, k) for variant in swept)
    for name in learnt(bench, first):
        for k in plan.cuts:
            yield from (_job("pruning", (name,), variant, k) for variant in swept)


def _mixed_ranks(bench: Bench, plan: Plan, variants: Sequence[Variant]) -> Iterator[Job]:
    """Sets with one adapter of each family in `plan.mixed`, of different tasks."""
    families = [family for family in plan.families if family.name in plan.mixed]
    pools = [learnt(bench, family) for family in families]
    random_draw = random.Random(0)  # noqa: S311
    found: dict[tuple[str, ...], None] = {}
    for _ in range(200 if pools and all(pools) else 0):
        names = tuple(random_draw.choice(pool) for pool in pools)
        if len({name.partition("/")[2] for name in names}) == len(names):
            found.setdefault(names)
    rank = max((family.rank for family in families), default=0)
    for names in list(found)[: 2 * plan.few]:
        for variant in variants:
            if variant.method != "linear":  # which needs one rank
                yield _job("mixed ranks", names, variant, rank)


def _composition(bench: Bench, plan: Plan, variants: Sequence[Variant]) -> Iterator[Job]:
    """Questions of a task to be answered in a style: right only if both are."""
    first = plan.families[0]
    for task in plan.composed:
        for style in STYLES:
            names = (f"{first.name}/{task}", f"{first.name}/{style}")
            if all(name in bench.adapters for name in names):
                for variant in variants:
                    yield Job("composition", names, (f"{task} as {style}",), variant, first.rank)


def learnt(bench: Bench, family: Family) -> list[str]:
    """Return the adapters of a family that know their task, by validation; styles left out."""
    names = [f"{family.name}/{task}" for task in family.tasks if task not in STYLES]
    return [name for name in names if name in bench.adapters and bench.share(name) >= LEARNT]


def draw(bench: Bench, family: Family, size: int, count: int) -> list[tuple[str, ...]]:
    """Draw sets of adapters of a family, the same ones each time."""
    known = learnt(bench, family)
    if len(known) < size:
        return []
    random_draw = random.Random(f"{family.name} {size}")  # noqa: S311
    found: dict[tuple[str, ...], None] = {}
    for _ in range(50 * count):
        if len(found) < count:
            found.setdefault(tuple(sorted(random_draw.sample(known, size))))
    return list(found)


def _job(experiment: str, names: tuple[str, ...], variant: Variant, rank: int) -> Job:
    return Job(experiment, names, tuple(name.partition("/")[2] for name in names), variant, rank)


def run(bench: Bench, todo: Iterator[Job]) -> bool:
    """Do the jobs that are not done yet; stop when it is late. Returns whether none is left.

    The CPU's cores merge what is for them while the device merges the rest and scores all.
    """
    missing = [job for job in todo if job.key not in bench.records]
    for_cores = deque(job for job in missing if job.variant.is_for_cores)
    here = deque(job for job in missing if not job.variant.is_for_cores)
    cores = max(1, (os.cpu_count() or 1) - 2)
    pending: list[tuple[Job, Any]] = []
    with multiprocessing.get_context("spawn").Pool(cores) as pool:  # which it ends when left
        while (for_cores or here or pending) and not bench.is_late:
            while for_cores and len(pending) < 2 * cores:
                job = for_cores.popleft()
                asked = (job.variant, str(bench.folder), job.members, job.rank)
                pending.append((job, pool.apply_async(make_elsewhere, asked)))
            ready = next((i for i, (_, result) in enumerate(pending) if result.ready()), None)
            if ready is not None:
                job, result = pending.pop(ready)
                bench.keep(_score(bench, job, taken(*result.get())))
            elif here:
                job = here.popleft()
                bench.keep(
                    _score(bench, job, make(job.variant, bench.members(job.members), job.rank))
                )
            else:
                pending[0][1].wait(0.05)
    return not (for_cores or here or pending)


def _score(bench: Bench, job: Job, merge: Merge) -> dict[str, Any]:
    """Score a merge: on validation at every scale, on test at the best of them and by the rules."""
    started = time.perf_counter()
    members = bench.members(job.members)
    rules = merge.rules(members) if len(job.variant.scales) > 1 else {"as it is": 1.0}
    scales = sorted({*job.variant.scales, *rules.values()})
    singles = [f"single|{name}" for name in job.members]
    composed = len(job.exams) != len(job.members)
    full = [1.0] if composed else [bench.share(name) or 1.0 for name in job.members]
    bench.subject.wear(merge.updates)
    validation = [hits(bench.subject, bench.exam(exam, "validation"), scales) for exam in job.exams]
    right = [of_exam.sum(dim=1).tolist() for of_exam in validation]
    kept = [
        sum(
            count[s] / of.shape[1] / share
            for count, of, share in zip(right, validation, full, strict=True)
        )
        for s in range(len(scales))
    ]
    best = scales[max(range(len(scales)), key=lambda s: kept[s])]
    # A rule for the scale that is chosen later, on validation, can be confirmed without the adapters.
    every = scales if job.experiment == "multi-task" and job.variant.label in CANDIDATES else ()
    asked = sorted({best, *rules.values(), *every})
    test = [hits(bench.subject, bench.exam(exam, "test"), asked) for exam in job.exams]
    return {
        "key": job.key,
        "experiment": job.experiment,
        "members": job.members,
        "singles": [] if composed else singles,
        "exams": job.exams,
        "variant": job.variant.label,
        "method": job.variant.method,
        "options": dict(job.variant.options),
        "bound": job.variant.bound,
        "k": job.rank,
        "rank": merge.rank,
        "fidelity": merge.fidelity,
        "norm": merge.norm,
        "sum_norm": members.sum_norm,
        "member_norms": members.norms,
        "rules": rules,
        "scales": scales,
        "validation": right,
        "validation_items": [of.shape[1] for of in validation],
        "best": best,
        "test": {repr(s): [packed(of[i]) for of in test] for i, s in enumerate(asked)},
        "merge_s": merge.seconds,
        "score_s": time.perf_counter() - started,
    }
