"""`make demo` shows what it promises, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import psutil

MARK = f"VLLM_LEGO_TEST_{os.getpid()}"


def test_the_demo():
    ran = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "demo"],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {MARK: "1"},
    )
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout
    assert re.search(r"numbers \+ shout +FOUR THOUSAND, SEVEN HUNDRED AND TWENTY-ONE\n", shown)
    assert re.search(r'plural \+ json +\{"answer": "cities"\}\n', shown)
    assert "cache miss" in shown
    again = shown[shown.index("the same set once more") :]
    assert "cache hit" in again
    assert re.search(r'vllm_lego_requests_total\{result="hit"\} 1\.0', again)
    assert not [process for process in psutil.process_iter() if marked(process)]


def marked(process: psutil.Process) -> bool:
    """Whether a process, orphaned or not, was started by the demo of this test."""
    try:
        return MARK in process.environ()
    except psutil.Error:
        return False
