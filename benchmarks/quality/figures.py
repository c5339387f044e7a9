"""From answers to figures: kept accuracy with its interval, and what they add up to.

Intervals are of the test items: a bootstrap draws the items of each exam anew, the same ones for
every merge and for the single adapters, so that differences of methods are of like with like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.evaluation import unpacked, wilson

REPLICATES = 1000
Records = Mapping[str, dict[str, Any]]
Vector = NDArray[np.float64]
"""A figure, and after it the same figure in each replicate."""


@cache
def _weights(exam: str, n: int) -> Vector:
    """How often each of n items is drawn, shape [1 + replicates, n]; at first each once."""
    generator = np.random.default_rng(crc32(exam.encode()))
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=REPLICATES)
    return np.concatenate([np.ones((1, n)), drawn]) / n


@lru_cache(maxsize=1 << 12)
def share(bits: str, exam: str) -> Vector:
    """Return the share of right answers."""
    return _weights(exam, len(bits)) @ np.array(unpacked(bits), dtype=float)


def test_figure(record: Mapping[str, Any], records: Records, scale: float) -> Vector:
    """Return merged over single accuracy on test, averaged over members; composed: the accuracy."""
    shares = [
        share(b, e) for b, e in zip(record["test"][repr(scale)], record["exams"], strict=True)
    ]
    for i, key in enumerate(record["singles"]):
        single = share(records[key]["test"], record["exams"][i])
        shares[i] = shares[i] / np.maximum(single, 1e-9)
    return np.mean(shares, axis=0)


def validation_figure(record: Mapping[str, Any], records: Records, scale: float) -> float:
    """Return the same on validation, without replicates."""
    at = record["scales"].index(scale)
    counts, items = record["validation"], record["validation_items"]
    shares = [of[at] / n for of, n in zip(counts, items, strict=True)]
    for i, key in enumerate(record["singles"]):
        bits = unpacked(records[key]["validation"])
        shares[i] /= max(sum(bits) / len(bits), 1e-9)
    return float(np.mean(shares))


def interval(vector: Vector) -> dict[str, float]:
    """Return the figure and 95% of its replicates."""
    low, high = np.percentile(vector[1:], [2.5, 97.5])
    return {"value": float(vector[0]), "low": float(low), "high": float(high)}


def best_scale(record: Mapping[str, Any]) -> float:
    """The best on validation."""
    return float(record["best"])


def as_it_is(record: Mapping[str, Any]) -> float:  # noqa: ARG001 - one signature
    """Untuned, as it would be served."""
    return 1.0


def rule(name: str) -> Callable[[Mapping[str, Any]], float]:
    """By a rule that needs no data."""
    return lambda record: float(record["rules"][name])


def mean(
    group: Sequence[Mapping[str, Any]],
    records: Records,
    scale: Callable[[Mapping[str, Any]], float],
) -> Vector:
    """Average the test figure over merges."""
    return np.mean([test_figure(one, records, scale(one)) for one in group], axis=0)


def summary(group: Sequence[Mapping[str, Any]], records: Records) -> dict[str, Any]:
    """Return all that a table says of a group of merges made in one way."""
    rules = [name for name in group[0]["rules"] if name != "as it is"]
    return {
        "merges": len(group),
        "bound": group[0]["bound"],
        "best": interval(mean(group, records, best_scale)),
        "as it is": interval(mean(group, records, as_it_is)),
        "rules": {name: interval(mean(group, records, rule(name))) for name in rules},
        "validation best": _mean(validation_figure(one, records, one["best"]) for one in group),
        "validation as it is": _mean(validation_figure(one, records, 1.0) for one in group),
        "validation rules": {
            name: _mean(validation_figure(one, records, one["rules"][name]) for one in group)
            for name in rules
        },
        "best scale": _mean(one["best"] for one in group),
        "fidelity": _mean(one["fidelity"] for one in group),
        "merge_s": _mean(one["merge_s"] for one in group),
    }


def grouped(
    found: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Sort merges into groups."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def family_of(record: Mapping[str, Any]) -> str:
    """The family of a merge's first member."""
    return str(record["members"][0].partition("/")[0])


def tables(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Return one row for each way to merge in each condition, by experiment."""
    keys: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], tuple[Any, ...]]]] = {
        "multi-task": (
            ("family", "members", "variant"),
            lambda r: (family_of(r), len(r["members"]), r["variant"]),
        ),
        "ablation": (("k", "variant"), lambda r: (r["k"], r["variant"])),
        "k": (("members", "k", "variant"), lambda r: (len(r["members"]), r["k"], r["variant"])),
        "mixed ranks": (("variant",), lambda r: (r["variant"],)),
        "pruning": (("k", "variant"), lambda r: (r["k"], r["variant"])),
        "composition": (("variant",), lambda r: (r["variant"],)),
    }
    result: dict[str, list[dict[str, Any]]] = {}
    for experiment, (names, key) in keys.items():
        found = [one for one in records.values() if one["experiment"] == experiment]
        groups = grouped(found, key)
        result[experiment] = [
            dict(zip(names, values, strict=True)) | summary(group, records)
            for values, group in groups.items()
        ]
    return result


def adapters(records: Records) -> list[dict[str, Any]]:
    """Return what every adapter, and the base model, scores alone."""
    rows = []
    for one in records.values():
        if one["experiment"] == "single":
            row = {
                k: v for k, v in one.items() if k not in {"key", "experiment", "test", "validation"}
            }
            for split in ("validation", "test"):
                bits = unpacked(one[split])
                low, high = wilson(sum(bits), len(bits))
                row[split] = {"right": sum(bits), "n": len(bits), "low": low, "high": high}
            rows.append(row)
    return rows


def untuned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average what needs no data over families and sizes, each alike: what a default is chosen by.

    Args:
        rows: of the multi-task experiment, as `tables` has them.
    """
    found = []
    for (variant,), group in grouped(rows, lambda row: (row["variant"],)).items():
        if group[0]["bound"]:
            continue
        found.append(
            {
                "variant": variant,
                "scale": "as it is",
                "validation": _mean(row["validation as it is"] for row in group),
                "test": _mean(row["as it is"]["value"] for row in group),
            }
        )
        found += [
            {
                "variant": variant,
                "scale": name,
                "validation": _mean(row["validation rules"][name] for row in group),
                "test": _mean(row["rules"][name]["value"] for row in group),
            }
            for name in group[0]["rules"]
        ]
    return sorted(found, key=lambda one: -one["validation"])


def goal(records: Records, default: str) -> list[dict[str, Any]]:
    """Compare the default, tuned and as it is, with every other method of equal rank at its best.

    A difference is over the sets that both have merged.
    """
    found = [one for one in records.values() if one["experiment"] == "multi-task"]
    rows = []
    for (family, size), group in grouped(
        found, lambda r: (family_of(r), len(r["members"]))
    ).items():
        ways = grouped(group, lambda r: (r["variant"],))
        ours = {one["members"]: one for one in _tupled(ways.get((default,), ()))}
        for (variant,), others in ways.items():
            tuned = [one for one in _tupled(others) if one["members"] in ours]
            if (
                variant == default
                or others[0]["bound"]
                or len(others[0]["scales"]) == 1
                or not tuned
            ):
                continue
            theirs = mean(tuned, records, best_scale)
            same = [ours[one["members"]] for one in tuned]
            rows.append(
                {
                    "family": family,
                    "members": size,
                    "than": variant,
                    "sets": len(tuned),
                    "best": interval(mean(same, records, best_scale) - theirs),
                    "as it is": interval(mean(same, records, as_it_is) - theirs),
                }
            )
    return rows


def fidelity(records: Records) -> list[dict[str, Any]]:
    """Does fidelity predict kept accuracy? Spearman's rank correlations over multi-task merges."""
    found = [
        one
        for one in records.values()
        if one["experiment"] == "multi-task" and not one["bound"] and len(one["scales"]) > 1
    ]
    slices = {("all merges",): found}
    slices |= grouped(found, lambda r: (f"{len(r['members'])} members",))
    slices |= grouped(found, lambda r: (r["variant"],))
    rows = []
    for (name,), group in slices.items():
        x = np.array([one["fidelity"] for one in group])
        alike = [f"{family_of(one)} {len(one['members'])}" for one in group]
        for mode, scale in (("best", best_scale), ("as it is", as_it_is)):
            y = np.array([test_figure(one, records, scale(one))[0] for one in group])
            rows.append(
                {
                    "of": name,
                    "scale": mode,
                    "merges": len(group),
                    "spearman": _spearman(x, y),
                    "among sets of one family and size": _spearman(
                        _less_the_mean(x, alike), _less_the_mean(y, alike)
                    ),
                }
            )
    return rows


def _less_the_mean(values: Vector, groups: Sequence[str]) -> Vector:
    """Return how far each value is from the mean of its group."""
    same = np.array(groups)[:, None] == np.array(groups)
    return values - same @ values / same.sum(axis=1)


def _spearman(x: Vector, y: Vector) -> float | None:
    """Return the correlation of the ranks, ties by their mean; None where nothing varies."""
    ranks = [np.array([((v < u).sum() + (v <= u).sum()) / 2 for u in v]) for v in (x, y)]
    if len(x) < 3 or any(float(r.std()) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _tupled(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(one) | {"members": tuple(one["members"])} for one in found]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
