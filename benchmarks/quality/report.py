"""The results, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality import figures
from benchmarks.quality.pictures import DEFAULT, label, order_of
from benchmarks.quality.tasks import STYLES, TASKS

NOTE = (
    "Kept accuracy in percent: exact match of the merge over that of the single adapter, averaged "
    "over members and sets, on the test split; in brackets 95% by bootstrap over the test items. "
    "*Best*: at the factor on the merge that is best on the validation split. *As it is*: untuned."
)
EXPERIMENTS = ("multi-task", "ablation", "k", "mixed ranks", "pruning", "composition")
Row = Mapping[str, Any]


def results_of(records: figures.Records, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return every number: of single adapters, of groups of merges, and of each merge."""
    records = dict(sorted(records.items(), key=lambda item: _place(item[1])))
    tables = figures.tables(records)
    return {
        **header,
        "adapters": figures.adapters(records),
        "tables": tables,
        "untuned": figures.untuned(tables["multi-task"]),
        "goal": figures.goal(records, DEFAULT),
        "fidelity": figures.fidelity(records),
        "merges": [
            _counts(record) for record in records.values() if record["experiment"] != "single"
        ],
    }


def _place(record: Row) -> tuple[Any, ...]:
    """Return where a result stands among others, however they came to be done."""
    if record["experiment"] == "single":
        return (0,)
    family, size = figures.family_of(record), len(record["members"])
    at = (EXPERIMENTS.index(record["experiment"]), family, size, record["k"])
    return (1, *at, *order_of(record["variant"]), record["variant"], record["members"])


def _counts(record: Row) -> dict[str, Any]:
    """Return a merge with right answers by exam for the answers themselves, and its own figures."""
    test = {
        scale: [of_exam.count("1") for of_exam in exams] for scale, exams in record["test"].items()
    }
    left_out = {"key", "singles"}
    return {k: v for k, v in record.items() if k not in left_out} | {
        "test": test,
        "test_items": [len(of_exam) for of_exam in next(iter(record["test"].values()))],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results as tables."""
    parts = [f"`{results['command']}` on {results['device']}", "", NOTE, ""]
    parts += ["## Single adapters", "", *_singles(results)]
    parts += ["", "## Without data: means over families and sizes of set", ""]
    parts += _table(
        ["", "scale", "validation", "test"],
        (
            [row["variant"], row["scale"], f"{row['validation']:.1%}", f"{row['test']:.1%}"]
            for row in results["untuned"]
        ),
    )
    for experiment, rows in results["tables"].items():
        if rows:
            parts += [
                "",
                f"## {experiment[0].upper() + experiment[1:]}",
                "",
                *SECTIONS[experiment](rows),
            ]
    if results["goal"]:
        parts += ["", f"## `{DEFAULT}` less the others at their best, points of kept accuracy", ""]
        parts += _table(
            ["family", "members", "than", f"{DEFAULT} at its best", f"{DEFAULT} as it is"],
            (
                [r["family"], r["members"], r["than"], _shown(r["best"]), _shown(r["as it is"])]
                for r in results["goal"]
            ),
        )
    if results["fidelity"]:
        parts += ["", "## Does fidelity predict kept accuracy? Spearman's correlation", ""]
        parts += _table(
            [
                "over",
                "scale",
                "merges",
                "correlation",
                alike := "among sets of one family and size",
            ],
            (
                [r["of"], r["scale"], r["merges"], _number(r["spearman"]), _number(r[alike])]
                for r in results["fidelity"]
            ),
        )
    return "\n".join(parts)


def _singles(results: Mapping[str, Any]) -> list[str]:
    rows = results["adapters"]
    base = {row["task"]: row["test"] for row in rows if row["adapter"] == "base"}
    return _table(
        ["adapter", "kind", "rank", "moves the weights by", "accuracy", "base model"],
        (
            [
                row["adapter"],
                _kind(row["task"]),
                row["rank"],
                f"{row['relative_norm']:.2%}",
                _score(row["test"]),
                _score(base[row["task"]]) if row["task"] in base else "",
            ]
            for row in rows
            if row["adapter"] != "base"
        ),
    )


def _kind(task: str) -> str:
    return TASKS[task].kind if task in TASKS else "style" if task in STYLES else ""


def _score(of: Row) -> str:
    return f"{of['right'] / of['n']:.1%} ({of['low']:.1%} to {of['high']:.1%})"


def _multi_task(rows: Sequence[Row]) -> list[str]:
    """One table for each family: sizes side by side; then the rules for the scale."""
    lines: list[str] = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        sizes = sorted({row["members"] for row in own})
        cells = {(row["variant"], row["members"]): row for row in own}
        names = list(dict.fromkeys(row["variant"] for row in own))
        for mode in ("best", "as it is"):
            lines += [f"Adapters {family}, {mode}:", ""]
            lines += _table(
                ["", *(f"{size} members" for size in sizes)],
                (
                    [
                        name,
                        *(
                            _shown(cells[name, s][mode]) if (name, s) in cells else ""
                            for s in sizes
                        ),
                    ]
                    for name in names
                ),
            )
            lines.append("")
        lines += [f"Adapters {family}, by rules for the scale that need no data:", ""]
        lines += _table(
            ["", "members", "best scale", "best", "as it is", *(rules := _rules(own))],
            (
                [
                    row["variant"],
                    row["members"],
                    _number(row["best scale"]),
                    _shown(row["best"]),
                    _shown(row["as it is"]),
                    *(_shown(row["rules"][rule]) for rule in rules),
                ]
                for row in sorted(own, key=lambda row: row["members"])
                if row["rules"]
            ),
        )
        lines.append("")
    return lines


def _rules(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["rules"]))


def _by_validation(rows: Sequence[Row]) -> list[str]:
    """Sorted by what may be looked at when a default is chosen: validation, untuned."""
    return _table(
        ["", "validation, as it is", "best", "test, as it is", "best", "best scale", "fidelity"],
        (
            [
                label(row),
                f"{row['validation as it is']:.1%}",
                f"{row['validation best']:.1%}",
                _shown(row["as it is"]),
                _shown(row["best"]),
                _number(row["best scale"]),
                _number(row["fidelity"]),
            ]
            for row in sorted(rows, key=lambda row: -row["validation as it is"])
        ),
    )


def _sweep(rows: Sequence[Row]) -> list[str]:
    by_size = "members" in rows[0]
    return _table(
        [*(["members"] if by_size else []), "k", "", "best", "as it is", "fidelity"],
        (
            [
                *([row["members"]] if by_size else []),
                row["k"],
                row["variant"],
                _shown(row["best"]),
                _shown(row["as it is"]),
                _number(row["fidelity"]),
            ]
            for row in rows
        ),
    )


SECTIONS = {
    "multi-task": _multi_task,
    "ablation": _by_validation,
    "k": _sweep,
    "mixed ranks": _by_validation,
    "pruning": _sweep,
    "composition": _by_validation,
}


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _shown(of: Row) -> str:
    return f"{100 * of['value']:.1f} ({100 * of['low']:.1f} to {100 * of['high']:.1f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
