"""The picture of `vllm-lego inspect --plot`. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lego_core import AdapterWriteError
from lego_core.comparison import UnitMap
from lego_core.config import METHOD_NAMES
from vllm_lego.shell.console import clean
from vllm_lego.shell.findings import Findings, layer_of

_OUTLINED = 64
"""Clusters: more outlines than this would hide what they surround."""
_LONGEST_NAME = 24
_TICKS = 16


def draw(findings: Findings, path: Path) -> None:
    """Write the picture.

    Raises:
        AdapterWriteError: it cannot be written there.
    """
    if findings.units is None:
        raise TypeError("no units to draw")
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_units(figure, left, findings.units, findings.names, findings.rank)
    _draw_fidelity(right, findings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise AdapterWriteError(
            f"the picture cannot be written to {str(path)!r} ({error.strerror or error})"
        ) from error


def _draw_units(figure: Figure, axes: Axes, units: UnitMap, names: list[str], rank: int) -> None:
    n = len(units.owners)
    image = axes.imshow(units.similarity, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("|cosine| of two units")
    n_clusters = units.clusters[-1] + 1
    sizes = [units.clusters.count(cluster) for cluster in range(n_clusters)]
    start = 0
    for size in sizes:
        if size > 1 or n_clusters <= _OUTLINED:
            outline = Rectangle(
                (start - 0.5, start - 0.5),
                size,
                size,
                fill=False,
                edgecolor="#d62728",
                linewidth=1.2,
            )
            axes.add_patch(outline)
        start += size
    # A strip beside the matrix and one above say whose unit each is.
    width = max(0.8, n / 30)
    colours = _colours(len(names))
    for unit, owner in enumerate(units.owners):
        of_row = Rectangle((-0.5 - 1.3 * width, unit - 0.5), width, 1)
        of_column = Rectangle((unit - 0.5, -0.5 - 1.3 * width), 1, width)
        for patch in (of_row, of_column):
            patch.set(facecolor=colours[owner], linewidth=0)
            axes.add_patch(patch)
    axes.set_xlim(-0.5 - 1.4 * width, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5 - 1.4 * width)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{n} units of {clean(units.module)}\nin {n_clusters} clusters, rank {rank}", fontsize=11
    )
    owners = sorted(set(units.owners))
    axes.legend(
        handles=[Patch(color=colours[owner], label=_short(names[owner])) for owner in owners],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=min(4, len(owners)),
        frameon=False,
    )


def _draw_fidelity(axes: Axes, findings: Findings) -> None:
    had = [outcome for outcome in findings.outcomes if outcome.fidelity is not None]
    had.sort(key=lambda outcome: -(outcome.fidelity or 0))
    layers, others = _places({name for outcome in had for name in outcome.modules})
    ticks = [str(layer) for layer in layers] + others
    colours = dict(zip(METHOD_NAMES, _colours(len(METHOD_NAMES)), strict=True))
    for outcome in had:
        by_layer: dict[int, list[float]] = {layer: [] for layer in layers}
        for name, fidelity in outcome.modules.items():
            layer = layer_of(name)
            if layer is not None:
                by_layer[layer].append(fidelity)
        means = [sum(of_layer) / len(of_layer) for of_layer in by_layer.values()]
        alone = [outcome.modules[name] for name in others]
        style: dict[str, Any] = {
            "color": colours[outcome.method],
            "marker": "o",
            "markersize": 3.5,
            "linewidth": 1.5,
        }
        axes.plot(
            range(len(means)), means, **style, label=f"{outcome.method}  {outcome.fidelity:.3f}"
        )
        axes.plot(range(len(means), len(ticks)), alone, **style | {"linestyle": "none"})
    axes.set_title(f"fidelity by layer, at rank {findings.rank}", fontsize=11)
    axes.set_ylabel("cosine with the exact weighted sum")
    axes.set_xlabel("layer, mean of its modules")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ticks, len(layers))
    if had:
        axes.set_ylim(top=1 + 0.02 * (1 - axes.get_ylim()[0]))
        axes.legend(
            title="method, fidelity in all",
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            frameon=False,
            alignment="left",
        )
    else:
        axes.text(0.5, 0.5, "no method tried", transform=axes.transAxes, ha="center")


def _places(modules: set[str]) -> tuple[list[int], list[str]]:
    """Return the layers, and the modules that are in none."""
    layers = {layer_of(name) for name in modules}
    return (
        sorted(layer for layer in layers if layer is not None),
        sorted(name for name in modules if layer_of(name) is None),
    )


def _label(axes: Axes, ticks: list[str], n_layers: int) -> None:
    """Label every few layers, and all that comes after them."""
    every = max(1, -(-n_layers // _TICKS))
    shown = [*range(0, n_layers, every), *range(n_layers, len(ticks))]
    axes.set_xticks(shown, [_short(ticks[i].rpartition(".")[2]) for i in shown])
    for tick, i in zip(axes.get_xticklabels(), shown, strict=True):
        if i >= n_layers:
            tick.set(rotation=30, ha="right")


def _colours(count: int) -> list[Any]:
    """Return colours that can be told apart."""
    palette = colormaps["tab10" if count <= 10 else "turbo"]
    return [palette(i if count <= 10 else i / (count - 1)) for i in range(count)]


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
