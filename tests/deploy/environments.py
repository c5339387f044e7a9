"""Environments with some of this one's packages, and mounts that only one command sees."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.tools import lacking


def environment_of(folder: Path, entries: Iterable[str]) -> str:
    """Make an environment that has these files and folders of this one's site-packages.

    Returns:
        Its interpreter.
    """
    venv.create(folder)
    have = folder / "have"
    have.mkdir()
    for entry in entries:
        (have / entry).symlink_to(Path(sysconfig.get_path("purelib")) / entry)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "have.pth").write_text(f"{have}\n")
    return str(folder / "bin/python")


def environment_without(folder: Path, *packages: str) -> str:
    """Make an environment that has all of this one's packages but the plugin and those named."""
    left_out = re.compile("|".join(("vllm_lego", "_editable_impl_vllm_lego", *packages)))
    entries = (entry.name for entry in Path(sysconfig.get_path("purelib")).iterdir())
    return environment_of(folder, (entry for entry in entries if not left_out.match(entry)))


def pinned(lines: str) -> set[str]:
    """Return the names in a list of requirements."""
    found = (line for line in lines.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(Requirement(line).name) for line in found}


def needed(*roots: str, among: set[str]) -> set[str]:
    """Return what these packages need, directly or not, on any Python that is supported."""
    todo, seen = [Requirement(root) for root in roots], set[tuple[str, frozenset[str]]]()
    while todo:
        package = todo.pop()
        name, extras = canonicalize_name(package.name), frozenset(package.extras)
        if (name, extras) in seen or name not in {*among, "vllm-lego"}:
            continue
        seen.add((name, extras))
        todo += [
            requirement
            for requirement in map(Requirement, distribution(name).requires or ())
            if requirement.marker is None
            or any(
                requirement.marker.evaluate(
                    {"extra": extra, "python_version": python, "python_full_version": f"{python}.9"}
                )
                for extra in ("", *extras)
                for python in ("3.11", "3.12")
            )
        ]
    return {name for name, _ in seen} - {"vllm-lego"}


def isolated(*arguments: str, **options: Any) -> str:
    """Run a command by `unshare` and return its output; skip, in CI fail, where that is forbidden."""
    if os.geteuid() != 0:
        lacking("needs root, to mount what only this test sees")
    allowed = subprocess.run(
        ["unshare", "--mount", "--net", "true"], capture_output=True, text=True, check=False
    )
    if allowed.returncode != 0:
        lacking(f"needs CAP_SYS_ADMIN: {allowed.stderr.strip()}")
    done = subprocess.run(
        ["unshare", *arguments], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
