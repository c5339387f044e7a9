"""Results of the stall table as JSON, Markdown and, where matplotlib is there, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""Measurements of each condition, see `load.measure`."""


def write(folder: Path, about: Mapping[str, Any], rounds: Rounds) -> str:
    """Write everything there is so far. Returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**about, "conditions": rounds}
    (folder / "stall.json").write_text(json.dumps(content, indent=1) + "\n")
    table = _table(rounds)
    (folder / "stall.md").write_text(f"`{about['command']}`, {about['device']}\n\n{table}\n")
    _picture(folder / "stall.png", rounds)
    return table


def _table(rounds: Rounds) -> str:
    peer = _longest(rounds["cached"]) if rounds.get("cached") else None
    lines = [
        "| condition | longest gap, ms (median; worst) | / cached | p99, ms | median, ms | joins: TTFT, ms (median; worst) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, measured in rounds.items():
        longest = _longest(measured)
        waits = [wait for one in measured for wait in one["ttft_ms"]]
        lines.append(
            f"| {name} | {longest:.1f}; {max(one['longest_ms'] for one in measured):.1f} "
            f"| {f'{longest / peer:.2f}' if peer else '-'} "
            f"| {statistics.median(one['p99_ms'] for one in measured):.1f} "
            f"| {statistics.median(one['median_ms'] for one in measured):.1f} "
            f"| {f'{statistics.median(waits):.0f}; {max(waits):.0f}' if waits else '-'} |"
        )
    return "\n".join(lines)


def _longest(measured: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(one["longest_ms"] for one in measured)


def _picture(path: Path, rounds: Rounds) -> None:
    try:
        import matplotlib as mpl  # noqa: PLC0415  optional

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for place, (name, measured) in enumerate(rounds.items()):
        axes.bar(place, _longest(measured), color="C0", width=0.6)
        dots = [one["longest_ms"] for one in measured]
        axes.plot([place] * len(dots), dots, "o", color="black", markersize=3)
        p99 = statistics.median(one["p99_ms"] for one in measured)
        axes.plot([place - 0.3, place + 0.3], [p99, p99], color="C1")
        axes.annotate(name, (place, 0), xytext=(0, -14), textcoords="offset points", ha="center")
    axes.set(xticks=[], ylabel="ms", title="Gaps between tokens of running streams")
    axes.text(0.01, 0.97, "bar: longest (median), dots: each run, line: p99", va="top",
              transform=axes.transAxes, fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
