"""`make demo` shows what it promises, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys

import psutil


def test_the_demo():
    ran = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "demo"],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout
    assert re.search(r"numbers \+ shout +FOUR THOUSAND, SEVEN HUNDRED AND TWENTY-ONE\n", shown)
    assert re.search(r'plural \+ json +\{"answer": "cities"\}\n', shown)
    assert "cache miss" in shown
    again = shown[shown.index("the same set once more") :]
    assert "cache hit" in again
    assert re.search(r'vllm_lego_requests_total\{result="hit"\} 1\.0', again)
    assert not [p for p in psutil.Process().children(recursive=True) if "vllm" in p.name().lower()]
