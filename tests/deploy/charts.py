"""The chart, rendered by the real helm."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, tool

CHART = ROOT / "deploy" / "helm" / "vllm-lego"
HELMS = ("helm3", "helm4")
VALUES = {
    **{
        p.name.removesuffix("-values.yaml"): p for p in sorted((CHART / "ci").glob("*-values.yaml"))
    },
    "cpu": CHART / "values-cpu.yaml",
}


class ChartError(Exception):
    """Helm refused; the message is what it wrote to stderr."""


def helm(name: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run `helm3` or `helm4`.

    Raises:
        ChartError: it failed.
    """
    command = [tool(name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    if done.returncode:
        raise ChartError(done.stderr)
    return done.stdout


def render(
    values: str | Path = "minimal", changes: dict[str, Any] | None = None, by: str = "helm4"
) -> list[dict[str, Any]]:
    """Return the manifests that `helm template` makes of a values file and changes to it."""
    return json.loads(_render(str(VALUES.get(str(values), values)), json.dumps(changes or {}), by))


@functools.cache
def _render(values: str, changes: str, by: str) -> str:
    sets = [f"--set-json={key}={json.dumps(value)}" for key, value in json.loads(changes).items()]
    text = helm(by, "template", "lego", str(CHART), "--namespace=llm", f"--values={values}", *sets)
    return json.dumps([manifest for manifest in yaml.safe_load_all(text) if manifest])


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the one manifest of a kind."""
    (manifest,) = (m for m in manifests if m["kind"] == kind)
    return manifest


def pod(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the Deployment says of its pods."""
    return of_kind(manifests, "Deployment")["spec"]["template"]["spec"]


def server(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the server's container."""
    (container,) = pod(manifests)["containers"]
    return container


def plain_environment(container: dict[str, Any]) -> dict[str, str]:
    """Return the variables of a container that are no secrets."""
    return {v["name"]: v["value"] for v in container["env"] if "value" in v}
