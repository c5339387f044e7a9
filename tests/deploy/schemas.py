"""Manifests against strict schemas: of Kubernetes, of the Prometheus operator and of KEDA."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from referencing import Registry, Resource

VERSIONS = ("1.31", "1.34", "1.37")

_FOLDER = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
_CUSTOM = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus.ServiceMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus.PrometheusRule,
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
}


def schema_problems(manifest: dict[str, Any], version: str = VERSIONS[-1]) -> list[str]:
    """Return what a strict schema says against a manifest."""
    api_version, kind = manifest.get("apiVersion", ""), manifest.get("kind", "")
    try:
        validator = _validator(api_version, kind, version)
    except FileNotFoundError:
        return [f"Kubernetes {version} has no {kind} in {api_version}"]
    return [
        f"{kind} {error.json_path}: {error.message}" for error in validator.iter_errors(manifest)
    ]


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    """As `kubernetes_validate.validate`, which reads its two megabytes anew for each manifest."""
    if model := _CUSTOM.get((api_version, kind)):
        return jsonschema.Draft202012Validator(_strict(model.model_json_schema()))
    group, _, name = api_version.rpartition("/")
    prefix = group.partition(".")[0]
    file = f"{kind.lower()}-{prefix + '-' if prefix else ''}{name}.json"
    folder = _FOLDER / f"v{version}.0-local-strict"
    schema = json.loads((folder / file).read_text())
    registry = Resource.from_contents(schema) @ _definitions(folder)
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def _definitions(folder: Path) -> Registry[Any]:
    definitions = json.loads((folder / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


def _strict(schema: Any) -> Any:
    """Refuse what a schema does not name, all the way down."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if "properties" in strict and strict.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict
