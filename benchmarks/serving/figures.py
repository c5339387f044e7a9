"""What was measured, round by round, and what comes of it: JSON, a table and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TICKS = [10**power * step for power in range(-3, 3) for step in (1, 2, 5)]
_NEAR_ONE = ("S1", "S2", "S5", "S6")  # the tables whose goals are within a few percent of it


@dataclass(slots=True)
class Figure:
    """One measure of one case, of both peers, a value a round.

    Attributes:
        table: `S1` to `S8`, as the package's docstring lists them.
        case: what was done.
        measure: what was measured.
        unit: of the values.
        goal: what the ratio is to be, `<= 1.02` for one; empty where nothing is claimed.
        lego, peer: the values, in the order of the rounds.
    """

    table: str
    case: str
    measure: str
    unit: str
    goal: str
    lego: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Return lego / peer of each round."""
        return [a / b for a, b in zip(self.lego, self.peer, strict=False) if b]

    def holds(self) -> bool | None:
        """Whether the median ratio meets the goal; None where there is none, or no ratio."""
        if not self.goal or not self.ratios():
            return None
        direction, bound = self.goal.split()
        ratio = statistics.median(self.ratios())
        return ratio <= float(bound) if direction == "<=" else ratio >= float(bound)


class Figures:
    """All figures of a run, written after each round, so that a run cut short has left something."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._about = about
        self._figures: dict[tuple[str, str, str], Figure] = {}

    def add(
        self, table: str, case: str, values: Mapping[str, tuple[str, str, float, float]]
    ) -> None:
        """Add a round: of each measure its unit, its goal, the plugin's value and the peer's."""
        for measure, (unit, goal, lego, peer) in values.items():
            figure = self._figures.setdefault(
                (table, case, measure), Figure(table, case, measure, unit, goal)
            )
            figure.lego.append(lego)
            figure.peer.append(peer)
            print(f"  {table} {case}, {measure}: {lego:.4g}, peer {peer:.4g} {unit}", flush=True)
        self.save()

    def tables(self) -> set[str]:
        """Return the tables that have a figure."""
        return {figure.table for figure in self._figures.values()}

    def save(self) -> str:
        """Write what there is. Returns the table."""
        self._folder.mkdir(parents=True, exist_ok=True)
        figures = sorted(self._figures.values(), key=lambda figure: figure.table)
        content = {
            **self._about,
            "figures": [
                {
                    "table": f.table,
                    "case": f.case,
                    "measure": f.measure,
                    "unit": f.unit,
                    "goal": f.goal,
                    "holds": f.holds(),
                    "lego": f.lego,
                    "peer": f.peer,
                }
                for f in figures
            ],
        }
        (self._folder / "serving.json").write_text(json.dumps(content, indent=1) + "\n")
        table = _table(figures)
        head = f"`{self._about['command']}`, {self._about['device']}, {self._about['versions']}"
        (self._folder / "serving.md").write_text(f"{head}\n\n{table}\n")
        return table

    def draw(self) -> None:
        """Draw every ratio that has a goal, where matplotlib is there."""
        try:
            import matplotlib as mpl  # noqa: PLC0415  optional

            mpl.use("Agg")
            from matplotlib import pyplot as plt  # noqa: PLC0415
        except ImportError:
            return
        drawn = [f for f in self._figures.values() if f.goal and f.ratios()][::-1]
        if not drawn:
            return
        near = [f for f in drawn if f.table in _NEAR_ONE]
        groups = [group for group in (near, [f for f in drawn if f not in near]) if group]
        picture, panels = plt.subplots(
            len(groups),
            squeeze=False,
            figsize=(8, 1.2 + 0.3 * len(drawn)),
            height_ratios=[1 + len(group) for group in groups],
            layout="constrained",
        )
        for axes, group in zip(panels[:, 0], groups, strict=True):
            for place, one in enumerate(group):
                ratios = one.ratios()
                bound = float(one.goal.split()[1])
                color = "C2" if one.holds() else "C3"
                axes.plot(ratios, [place] * len(ratios), "o", color=color, alpha=0.5, markersize=4)
                axes.plot(statistics.median(ratios), place, "D", color=color, markersize=6)
                axes.plot([bound, bound], [place - 0.35, place + 0.35], color="black")
            axes.set_yticks(range(len(group)), [f"{f.table} {f.case}, {f.measure}" for f in group])
            axes.axvline(1, color="gray", linewidth=0.5)
            if group is not near:
                axes.set_xscale("log")
                ends = axes.get_xlim()
                ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
        panels[-1, 0].set_xlabel(
            "plugin / peer\nbar: goal, diamond: median, dots: rounds, red: missed"
        )
        picture.savefig(self._folder / "serving.png", dpi=120)
        plt.close(picture)


def _table(figures: list[Figure]) -> str:
    lines = [
        "| | case | measure | plugin | peer | ratio (least to most) | rounds | goal | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    says = {None: "", True: "met", False: "**missed**"}
    for f in figures:
        ratios = f.ratios()
        ratio = (
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            if ratios
            else "-"
        )
        lines.append(
            f"| {f.table} | {f.case} | {f.measure}, {f.unit} | {statistics.median(f.lego):.4g} "
            f"| {statistics.median(f.peer):.4g} | {ratio} | {len(f.lego)} | {f.goal or '-'} "
            f"| {says[f.holds()]} |"
        )
    return "\n".join(lines)
