"""The programs that `make test` puts into .venv/deploy-tools/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """Return the path of a program. Where it could not be had: skip, in CI fail."""
    path = ROOT / ".venv" / "deploy-tools" / name
    if not path.exists():
        lacking(f"{name} is not in .venv/deploy-tools/; deploy/local/deploy_tools.sh says why")
    return str(path)


def lacking(reason: str) -> NoReturn:
    """End a test that cannot run here: skip, in CI fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
