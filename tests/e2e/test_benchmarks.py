"""The benchmarks run, in their short forms, and what they check holds. No speed is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(module: str, out: Path) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", module, "--smoke", f"--out={out}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (result,) = out.glob("*.json")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_the_stall_table(tmp_path):
    result = run("benchmarks.serving", tmp_path)
    assert set(result["conditions"]) == {"idle", "cached", "cold", "first", "stock"}
    for condition, (measured,) in result["conditions"].items():
        assert measured["tokens"] > 0
        assert measured["longest_ms"] >= measured["p99_ms"] >= measured["median_ms"] >= 0
        assert len(measured["ttft_ms"]) == (0 if condition == "idle" else 2)
    assert "| cold |" in (tmp_path / "stall.md").read_text()


def test_a_short_soak(tmp_path):
    result = run("benchmarks.serving.soak", tmp_path)
    assert result["requests"] == 400
    assert result["checks"]
    assert all(result["checks"].values())
