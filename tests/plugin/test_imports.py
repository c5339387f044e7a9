"""Dependencies point one way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_lego"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("vllm_lego.adapter_set", ("torch", "vllm", "lego_core")),
        ("vllm_lego.cache", ("torch", "vllm", "lego_core")),
        ("vllm_lego.settings", ("torch", "vllm", "lego_core")),
        ("vllm_lego.request_body", ("torch", "vllm", "lego_core")),
        ("vllm_lego.plugin", ("torch", "vllm")),
        ("vllm_lego.worker", ("vllm", "fastapi")),
        ("vllm_lego.service", ("vllm", "fastapi")),
        ("lego_core", ("vllm", "vllm_lego", "fastapi", "transformers", "peft")),
    ],
)
def test_a_module_does_not_import(module, forbidden):
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    assert module in loaded
    assert not set(forbidden) & set(loaded)


def test_one_file_imports_vllm():
    importers = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(
            line.strip().startswith(("from vllm.", "from vllm ", "import vllm.", "import vllm "))
            for line in path.read_text().splitlines()
        )
    ]
    assert importers == ["_vllm.py"]
