"""The benchmarks run, in their short forms, and what they check holds. No speed is judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)  # two servers, on two slow cores with a third beside them


def run(module: str, out: Path, *arguments: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", module, "--smoke", f"--out={out}", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (result,) = out.glob("*.json")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def assert_finite(figures: list[dict[str, Any]]) -> None:
    for one in figures:
        assert len(one["lego"]) == len(one["peer"]) == 1, one
        assert all(math.isfinite(value) for value in one["lego"] + one["peer"]), one
        assert one["peer"][0] > 0, one


def test_the_serving_tables(tmp_path):
    result = run("benchmarks.serving", tmp_path)
    figures = result["figures"]
    assert {one["table"] for one in figures} == {"S1", "S2", "S3", "S4", "S5", "S8"}
    assert_finite(figures)
    cases = {one["case"] for one in figures if one["table"] == "S4"}
    assert cases == {
        "members on the device",
        "members in host memory",
        "members on disk",
        "in the store",
    }
    assert "| S3 | cold sets arrive |" in (tmp_path / "serving.md").read_text()


def test_the_table_of_popularity(tmp_path):
    """It starts servers of its own."""
    figures = run("benchmarks.serving", tmp_path, "--only", "S6")["figures"]
    assert {one["table"] for one in figures} == {"S6"}
    assert_finite(figures)


def test_the_cost_of_a_request(tmp_path):
    result = run("benchmarks.overhead", tmp_path)
    assert {row["body"] for row in result["interception"]} == {"1 KB", "100 KB", "1 MB"}
    assert len(result["servers"]) == 2
    measured = [
        row[f"{of}_{which}"]
        for row in result["servers"]
        for of in ("per_s", "cpu_us")
        for which in ("plugin", "stock")
    ]
    assert all(math.isfinite(value) and value > 0 for value in measured)


def test_the_reading_of_members(tmp_path):
    rounds = run("benchmarks.reading", tmp_path)["rounds"]
    assert len(rounds) == 2
    for one in rounds:
        assert {"vLLM reads 1", "identify 3", "read 3", "merge 3"} <= one.keys()
        assert all(math.isfinite(wall) and wall > 0 for wall, _ in one.values())
    assert "| read 3 |" in (tmp_path / "cpu.md").read_text()


def test_a_short_soak(tmp_path):
    result = run("benchmarks.serving.soak", tmp_path)
    assert result["requests"] == 400
    assert result["checks"]
    assert all(result["checks"].values())
