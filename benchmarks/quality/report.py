"""Tables and pictures of the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import figures
from benchmarks.quality.tasks import STYLES, TASKS

DEFAULT = "lego"
NOTE = (
    "Kept accuracy in percent: exact match of the merge over that of the single adapter, averaged "
    "over members and sets, on the test split; in brackets 95% by bootstrap over the test items. "
    "*Best*: at the factor on the merge that is best on the validation split. *As it is*: untuned."
)
Row = Mapping[str, Any]


def results_of(records: figures.Records, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return every number: of single adapters, of groups of merges, and of each merge."""
    return {
        **header,
        "adapters": figures.adapters(records),
        "tables": figures.tables(records),
        "goal": figures.goal(records, DEFAULT),
        "fidelity": figures.fidelity(records),
        "merges": [
            _counts(record) for record in records.values() if record["experiment"] != "single"
        ],
    }


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
            ["over", "scale", "merges", "correlation"],
            (
                [r["of"], r["scale"], r["merges"], _number(r["spearman"])]
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
                _label(row),
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


def _label(row: Row) -> str:
    return f"k {row['k']}, {row['variant']}" if "k" in row else row["variant"]


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


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Draw kept accuracy by method and set size, by scale and by k, the ablation, and fidelity."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `benchmarks`
    except ImportError:
        print("no pictures: pip install matplotlib, then --draw")
        return
    for name, paint in PICTURES.items():
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        if paint(figure, results):
            figure.savefig(folder / f"{name}.png", dpi=150)


def _by_size(figure: Any, results: Mapping[str, Any]) -> bool:
    rows = [row for row in results["tables"]["multi-task"] if row["rules"]]
    families = list(dict.fromkeys(row["family"] for row in rows))
    if not families:
        return False
    for axes, family in zip(
        figure.subplots(1, len(families), squeeze=False)[0], families, strict=True
    ):
        own = [row for row in rows if row["family"] == family]
        for name in dict.fromkeys(row["variant"] for row in own):
            of = sorted((r for r in own if r["variant"] == name), key=lambda r: r["members"])
            values = [100 * row["best"]["value"] for row in of]
            spread = [
                [100 * abs(row["best"]["value"] - row["best"][end]) for row in of]
                for end in ("low", "high")
            ]
            axes.errorbar(
                [row["members"] for row in of],
                values,
                spread,
                marker="o",
                linestyle=":" if of[0]["bound"] else "-",
                linewidth=2.5 if name == DEFAULT else 1,
                capsize=2,
                label=name,
            )
        axes.set(title=family, xlabel="members", ylabel="kept accuracy at the best scale, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return True


def _by_scale(figure: Any, results: Mapping[str, Any]) -> bool:
    singles = {row["adapter"]: row["validation"]["right"] for row in results["adapters"]}
    found = [
        m for m in results["merges"] if m["experiment"] == "multi-task" and len(m["scales"]) > 1
    ]
    sizes = sorted({len(merge["members"]) for merge in found})
    if not sizes:
        return False
    for axes, size in zip(
        figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True
    ):
        curves: dict[str, dict[float, list[float]]] = {}
        for merge in found:
            if len(merge["members"]) == size and not merge["bound"]:
                full = [max(singles[name], 1) for name in merge["members"]]
                for at, scale in enumerate(merge["scales"]):
                    kept = [of[at] / one for of, one in zip(merge["validation"], full, strict=True)]
                    points = curves.setdefault(merge["variant"], {}).setdefault(scale, [])
                    points.append(100 * sum(kept) / size)
        for name, curve in curves.items():
            most = max(map(len, curve.values()))  # scales of the grid, which all merges have tried
            shown = sorted((s, sum(p) / len(p)) for s, p in curve.items() if len(p) == most)
            axes.plot(
                *zip(*shown, strict=True), linewidth=2.5 if name == DEFAULT else 1, label=name
            )
        axes.set(title=f"{size} members", xlabel="scale", xscale="log")
    figure.axes[0].set_ylabel("kept accuracy on validation, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return True


def _by_k(figure: Any, results: Mapping[str, Any]) -> bool:
    panels: dict[str, list[Row]] = {}
    for row in results["tables"]["k"]:
        panels.setdefault(f"{row['members']} members", []).append(row)
    if pruned := results["tables"]["pruning"]:
        panels["one adapter pruned"] = pruned
    if not panels:
        return False
    for axes, (title, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True
    ):
        for name in dict.fromkeys(row["variant"] for row in rows):
            of = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["k"])
            line = axes.plot(
                [row["k"] for row in of],
                [100 * row["best"]["value"] for row in of],
                "o-",
                label=name,
            )
            untuned = [100 * row["as it is"]["value"] for row in of]
            axes.plot([row["k"] for row in of], untuned, ":", color=line[0].get_color())
        axes.set(title=title, xlabel="k")
        axes.set_xscale("log", base=2)
    figure.axes[0].set_ylabel("kept accuracy, %; dotted: as it is")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return True


def _ablation(figure: Any, results: Mapping[str, Any]) -> bool:
    rows = sorted(results["tables"]["ablation"], key=lambda row: row["validation as it is"])
    if not rows:
        return False
    figure.set_size_inches(11, 1 + 0.3 * len(rows))
    axes = figure.subplots()
    for mode, marker in (("as it is", "o"), ("best", "x")):
        axes.plot([100 * row[mode]["value"] for row in rows], range(len(rows)), marker, label=mode)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axes.set_xlabel("kept accuracy on test, %")
    axes.legend(frameon=False)
    return True


def _fidelity(figure: Any, results: Mapping[str, Any]) -> bool:
    rows = [row for row in results["tables"]["multi-task"] if row["rules"] and not row["bound"]]
    if not rows:
        return False
    axes = figure.subplots()
    for name in dict.fromkeys(row["variant"] for row in rows):
        of = [row for row in rows if row["variant"] == name]
        axes.plot(
            [row["fidelity"] for row in of],
            [100 * row["best"]["value"] for row in of],
            "o",
            label=name,
        )
    axes.set(xlabel="fidelity to the sum", ylabel="kept accuracy at the best scale, %")
    figure.legend(loc="outside right", frameon=False)
    return True


PICTURES = {
    "methods": _by_size,
    "scale": _by_scale,
    "k": _by_k,
    "ablation": _ablation,
    "fidelity": _fidelity,
}
