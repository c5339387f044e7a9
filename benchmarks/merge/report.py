"""Tables and pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"`{results['command']}` on {results['device']}", ""]
    if results.get("merges"):
        lines += [
            "| case | copy, ms | merge, ms | / copy | on the device / copy | extra memory / pool |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    for row in results.get("merges", []):
        wall = row["merge_wall_ms"]
        lines.append(
            f"| {row['case']} | {row['copy_ms']['median']:.3f} "
            f"| {wall['median']:.3f} ({wall['min']:.3f} to {wall['max']:.3f}) "
            f"| {row['wall_over_copy']:.1f} | {row['device_over_copy']:.1f} "
            f"| {row['extra_over_pool']:.2f} |"
        )
    for row in results.get("peers", []):
        lines += ["", f"{row['module']}, one module, milliseconds (times ours):", ""]
        lines += [
            f"- {name}: {peer['median_ms']:.1f} ({peer['over_ours']:.1f})"
            for name, peer in row["peers"].items()
        ]
    for row in results.get("accuracy", []):
        lines += ["", *(f"- {name}: {value}" for name, value in row.items())]
    lines += ["", *(f"- left out: {what}" for what in results.get("left_out", []))]
    return "\n".join(lines).rstrip()


def draw(results: dict[str, Any], file: Path) -> int:
    """Draw how the time grows with adapters, rank, k and model. Returns an exit code."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `benchmarks`
    except ImportError:
        print("no picture: pip install 'vllm-lego[benchmarks]', then --draw the JSON file")
        return 1
    rows = results["merges"]
    base = rows[0]
    fields = ("adapters", "rank", "k", "modules")
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, field in zip(figure.subplots(1, len(fields), sharey=True), fields, strict=True):
        shown = sorted(
            (
                row
                for row in rows
                if all(row[other] == base[other] for other in fields if other != field)
                or (field == "modules" and row["model"] != base["model"])
            ),
            key=lambda row: row[field],
        )
        for key, label in (("merge_wall_ms", "merge"), ("copy_ms", "copy of the pool")):
            places = [row["model"] if field == "modules" else str(row[field]) for row in shown]
            axes.plot(places, [row[key]["median"] for row in shown], "o-", label=label)
        axes.set_xlabel("model" if field == "modules" else field)
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{base['case']} on {results['device']}, one thing varied at a time")
    figure.savefig(file, dpi=150)
    return 0
