"""The merge benchmark runs, on tiny shapes, and all its figures are finite."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def test_smoke_run_has_finite_figures(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.merge", "--smoke", "--device", "cpu", "--out", tmp_path],
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=500,
    )
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["merges"]
    assert all(math.isfinite(number) for number in numbers(results))
    assert all(row["merge_wall_ms"]["median"] > 0 for row in results["merges"])
    (accuracy,) = results["accuracy"]
    assert accuracy["largest_relative_error"] < 1e-3
    assert results["command"] in (tmp_path / "cpu.md").read_text()
