"""The programs that set-up puts into .venv/deploy-tools/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """Return the path of a program. Where set-up could not get it: skip, in CI fail."""
    path = ROOT / ".venv" / "deploy-tools" / name
    if not path.exists():
        lacking(f"{name} is not in .venv/deploy-tools/; `make setup` says why")
    return str(path)


def lacking(reason: str) -> NoReturn:
    """End a test that cannot run here: skip, in CI fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
