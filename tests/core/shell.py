"""Run `vllm-lego` on real and on tiny adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lego_core import LoraAdapter, LoraModule, save_adapter
from vllm_lego.cli import main

ADAPTERS = Path(__file__).parents[2] / "vllm_lego" / "demo" / "adapters"
PLURAL, JSON, SIGNOFF = (str(ADAPTERS / name) for name in ("plural", "json", "signoff"))


def run(*arguments, cwd=None, code=0):
    """Run the installed command; stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def fails(capsys, *arguments, code=1):
    """Run in this process; the one line on stderr, and nothing on stdout."""
    try:
        got = main([*map(str, arguments)])
    except SystemExit as stopped:
        got = stopped.code
    said = capsys.readouterr()
    assert got == code, said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith(f"vllm-lego {arguments[0]}: ")
    return said.err


def as_json(capsys, *arguments, code=0):
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def tiny(folder, *, rank=2, width=8, base="org/base", names=("layers.0.q", "layers.1.q"), **fields):
    generator = torch.Generator().manual_seed(rank + width)
    modules = {
        name: LoraModule(
            torch.randn(rank, width, generator=generator),
            torch.randn(width, rank, generator=generator),
        )
        for name in names
    }
    save_adapter(LoraAdapter(folder.name, modules, base_model=base), folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return str(folder)
