"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lego_core.config import METHOD_NAMES

DEFAULT = "lego"


def order_of(variant: str) -> tuple[bool, int]:
    """Return where a method stands among others: bounds after competitors, then by method."""
    method = variant.split(",", maxsplit=1)[0].split(":", maxsplit=1)[0]
    known = [*METHOD_NAMES, "sum"]
    return variant.endswith(("no cut", "dense")), known.index(method)


def label(row: Mapping[str, Any]) -> str:
    """Return what a row of the ablation is called."""
    return f"k {row['k']}, {row['variant']}" if "k" in row else row["variant"]


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


def _style(variant: str) -> dict[str, Any]:
    """Return how a method is drawn, the same in every picture."""
    bound, method = order_of(variant)
    return {
        "color": f"C{method}" if method < 10 else "black",
        "linestyle": "--" if bound else "-",
        "linewidth": 2.5 if variant == DEFAULT else 1,
        "label": variant,
    }


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
                markersize=3,
                capsize=2,
                **_style(name),
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
            axes.plot(*zip(*shown, strict=True), **_style(name))
        axes.set(title=f"{size} members", xlabel="scale")
        axes.set_xscale("log", base=2)
    figure.axes[0].set_ylabel("kept accuracy on validation, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return True


def _by_k(figure: Any, results: Mapping[str, Any]) -> bool:
    panels: dict[str, list[Mapping[str, Any]]] = {}
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
            ks, style = [row["k"] for row in of], _style(name)
            axes.plot(ks, [100 * row["best"]["value"] for row in of], marker="o", **style)
            style |= {"linestyle": ":", "label": None}
            axes.plot(ks, [100 * row["as it is"]["value"] for row in of], **style)
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
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
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
            color=_style(name)["color"],
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
