"""What `lego_core` imports is what its distribution declares, and nothing of the plugin."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = {
    "triton": {"kernels.py", "triton_clustering.py", "triton_passes.py"},  # comes with CUDA's torch
    "transformers": {"base_model.py"},
}


def imported() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "lego_core").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            yield from ((path.name, name.partition(".")[0]) for name in names)


def test_lego_core_imports_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {entry.partition(">")[0] for entry in project["dependencies"]}
    allowed = declared | set(sys.stdlib_module_names) | {"lego_core"}
    found = set(imported())
    assert ("merge.py", "torch") in found
    surplus = {(file, name) for file, name in found if name not in allowed}
    assert surplus == {(file, name) for name, files in OPTIONAL.items() for file in files}
