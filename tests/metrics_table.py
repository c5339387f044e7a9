"""What `docs/metrics.md` says of each metric, and what a server exposes, in one form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import REGISTRY, Metric

from vllm_lego.metrics import Metrics

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"

Labels = dict[str, frozenset[str]]
OPEN = frozenset({"…"})  # of `vllm_lego_info`: one value a server


@dataclass(frozen=True)
class Described:
    """A metric's kind, and its labels with all values that they take."""

    kind: str
    labels: Labels


def documented() -> dict[str, Described]:
    """Return the rows of the document's table by the metric's name, as it is queried."""
    rows = re.findall(
        r"^\| `(vllm_lego_\w+)` \| (\w+) \|(.*?)\| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE
    )
    return {name: Described(kind, _labels(cell)) for name, kind, cell, _ in rows}


def _labels(cell: str) -> Labels:
    """Read "`tier`: device, host, disk; `other`: …"."""
    return {
        name: frozenset(values.replace("`", "").strip().split(", "))
        for name, values in re.findall(r"`(\w+)`: ([^;]+)", cell)
    }


def registered() -> list[Metric]:
    """Return the plugin's metrics as they are before anything has happened."""
    metrics = Metrics()
    try:
        return [family for metric in vars(metrics).values() for family in metric.collect()]
    finally:
        for metric in vars(metrics).values():
            REGISTRY.unregister(metric)


def exposed(families: Iterable[Metric]) -> Iterator[tuple[str, Described]]:
    """Return the plugin's metrics among those that were scraped or collected."""
    for family in families:
        if not family.name.startswith("vllm_lego"):
            continue
        values: dict[str, set[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label != "le":
                    values.setdefault(label, set()).add(value)
        if family.name == "vllm_lego_info":
            values = {label: set(OPEN) for label in values}
        name = family.name + "_total" * (family.type == "counter")
        labels = {label: frozenset(found) for label, found in values.items()}
        yield name, Described(family.type, labels)
