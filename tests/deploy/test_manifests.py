"""The checks of manifests find what they are there for: mistakes planted in what the chart makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.charts import of_kind, render
from tests.deploy.manifests import problems
from tests.deploy.schemas import schema_problems

Release = dict[str, dict[str, Any]]


def _pod(release: Release) -> dict[str, Any]:
    return release["Deployment"]["spec"]["template"]["spec"]


def _server(release: Release) -> dict[str, Any]:
    return _pod(release)["containers"][0]


def _put(path: str, value: Any) -> Callable[[Release], None]:
    """Set `Kind.field.0.field`; None deletes."""
    *way, last = path.split(".")

    def change(release: Release) -> None:
        place: Any = release
        for step in way:
            place = place[int(step) if isinstance(place, list) else step]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


POD = "Deployment.spec.template.spec"
SERVER = f"{POD}.containers.0"
SEMANTIC = {
    "no name": (_put("Service.metadata.name", "Lego_Service"), "is no name for it"),
    "digit first": (_put("Service.metadata.name", "1lego"), "is no name for it"),
    "long name": (_put("Service.metadata.name", "l" * 64), "is no name for it"),
    "label": (_put("Deployment.metadata.labels.team", "-ml-"), "label team"),
    "selector": (
        _put("Deployment.spec.selector.matchLabels.tier", "gpu"),
        "does not match its pods",
    ),
    "service selector": (_put("Service.spec.selector.tier", "gpu"), "selects no pod"),
    "budget selector": (
        _put("PodDisruptionBudget.spec.selector.matchLabels.tier", "gpu"),
        "no pod",
    ),
    "policy selector": (_put("NetworkPolicy.spec.podSelector.matchLabels.tier", "gpu"), "no pod"),
    "monitor selector": (
        _put("ServiceMonitor.spec.selector.matchLabels.tier", "gpu"),
        "no Service",
    ),
    "spread selector": (
        _put(f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels.tier", "gpu"),
        "selects none of its pods",
    ),
    "undefined volume": (
        _put(f"{SERVER}.volumeMounts.0.name", "scratch"),
        "scratch is not defined",
    ),
    "unused volume": (
        lambda r: _pod(r)["volumes"].append({"name": "scratch", "emptyDir": {}}),
        "scratch is mounted nowhere",
    ),
    "mounted twice": (_put(f"{SERVER}.volumeMounts.0.mountPath", "/models"), "mount at /models"),
    "variable twice": (
        lambda r: _server(r)["env"].append({"name": "HOME", "value": "/root"}),
        "variable HOME is there twice",
    ),
    "missing claim": (
        _put(f"{POD}.volumes.4.persistentVolumeClaim.claimName", "lego-llm-modles"),
        "PersistentVolumeClaim lego-llm-modles is not there",
    ),
    "missing account": (_put(f"{POD}.serviceAccountName", "lego-llm-x"), "lego-llm-x is not there"),
    "probe's port": (_put(f"{SERVER}.livenessProbe.httpGet.port", "https"), "asks port https"),
    "service's port": (_put("Service.spec.ports.0.targetPort", "https"), "https is no port"),
    "policy's port": (_put("NetworkPolicy.spec.ingress.0.ports.0.port", 8000), "8000 is no port"),
    "policy for all": (_put("NetworkPolicy.spec.ingress.0.from", []), "lets everybody in"),
    "monitor's port": (_put("ServiceMonitor.spec.endpoints.0.port", "metrics"), "port metrics"),
    "port range": (_put("Service.spec.ports.0.port", 70000), "70000 is no port"),
    "port name": (_put(f"{SERVER}.ports.0.name", "the-http-endpoint"), "is no name"),
    "gpu": (_put(f"{SERVER}.resources.requests", {"nvidia.com/gpu": 1}), "must be equal"),
    "gpu without limit": (_put(f"{SERVER}.resources.limits", {"cpu": 9}), "must be equal"),
    "memory": (_put(f"{SERVER}.resources.requests.memory", "65Gi"), "is above limit 64Gi"),
    "quantity": (_put(f"{SERVER}.resources.limits.memory", "64GiB"), "'64GiB' is no quantity"),
    "size": (_put(f"{POD}.volumes.3.emptyDir.sizeLimit", "many"), "'many' is no quantity"),
    "rollout": (
        _put("Deployment.spec.strategy.rollingUpdate", {"maxSurge": 0, "maxUnavailable": "0%"}),
        "no rollout can begin",
    ),
    "strategy": (_put("Deployment.spec.strategy.type", "Recreate"), "rollingUpdate with type"),
    "deadline": (_put("Deployment.spec.progressDeadlineSeconds", 600), "start-up budget of 1800 s"),
    "pull policy": (_put(f"{SERVER}.imagePullPolicy", "Sometimes"), "'Sometimes', not one of"),
    "service type": (_put("Service.spec.type", "Balancer"), "'Balancer' is not one of"),
    "strategy type": (_put("Deployment.spec.strategy.type", "Rolling"), "'Rolling' is not one of"),
    "access mode": (_put("PersistentVolumeClaim.spec.accessModes", ["RWX"]), "has 'RWX'"),
    "spread": (
        _put(f"{POD}.topologySpreadConstraints.0.whenUnsatisfiable", "Maybe"),
        "'Maybe', not one of",
    ),
    "policy type": (_put("NetworkPolicy.spec.policyTypes", ["ingress"]), "has 'ingress'"),
    "grace": (_put(f"{POD}.terminationGracePeriodSeconds", 600), "it takes up to 625 s to drain"),
    "no grace": (_put(f"{POD}.terminationGracePeriodSeconds", None), "is killed after 30 s"),
    "hasty liveness": (_put(f"{SERVER}.readinessProbe.failureThreshold", 60), "no more patient"),
    "root": (_put(f"{POD}.securityContext.runAsNonRoot", None), "may run as root"),
    "root file system": (
        _put(f"{SERVER}.securityContext.readOnlyRootFilesystem", None),
        "may write",
    ),
    "privileges": (_put(f"{SERVER}.securityContext.allowPrivilegeEscalation", None), "may gain"),
    "plain secret": (
        lambda r: _server(r)["env"].append({"name": "AWS_SESSION_TOKEN", "value": "x"}),
        "AWS_SESSION_TOKEN is a secret in plain text",
    ),
    "replicas": (_put("Deployment.spec.replicas", 3), "has replicas of its own"),
    "scaled": (
        _put("HorizontalPodAutoscaler.spec.scaleTargetRef.name", "x"),
        "x, which is not there",
    ),
    "bounds": (_put("HorizontalPodAutoscaler.spec.minReplicas", 9), "minReplicas 9 is above"),
    "two scalers": (
        lambda r: r.update(ScaledObject=of_kind(render("keda"), "ScaledObject")),
        "one of two autoscalers",
    ),
    "scrape": (
        _put("ServiceMonitor.spec.endpoints.0.scrapeTimeout", "1m"),
        "is above interval 30s",
    ),
    "big": (_put("ConfigMap.data.policy", "x" * (1 << 20)), "more than a ConfigMap holds"),
}
SCHEMAS = {
    "unknown field": (_put(f"{SERVER}.volumeMount", []), "volumeMount"),
    "misplaced field": (_put(f"{POD}.replicas", 2), "replicas"),
    "wrong type": (_put("Service.spec.ports.0.port", "http"), "port"),
    "missing field": (_put("HorizontalPodAutoscaler.spec.maxReplicas", None), "maxReplicas"),
    "no such api": (_put("PodDisruptionBudget.apiVersion", "policy/v1beta1"), "has no"),
    "monitor": (_put("ServiceMonitor.spec.endpoints.0.scrapeInterval", "30s"), "scrapeInterval"),
    "rule": (_put("PrometheusRule.spec.groups.0.rules.0.expression", "1"), "expression"),
}


@pytest.fixture
def release() -> Release:
    """The manifests by kind; of two of one kind the second has its name as well."""
    by_kind: Release = {}
    for manifest in render("everything"):
        kind = manifest["kind"]
        by_kind[f"{kind} {manifest['metadata']['name']}" if kind in by_kind else kind] = manifest
    return by_kind


def test_what_the_chart_makes_is_free_of_them(release):
    assert problems(release.values()) == []
    assert [p for m in release.values() for p in schema_problems(m)] == []


@pytest.mark.parametrize("mistake", SEMANTIC)
def test_a_mistake_between_the_lines_is_found(mistake, release):
    plant, said = SEMANTIC[mistake]
    plant(release)
    assert any(said in problem for problem in problems(release.values())), problems(
        release.values()
    )


@pytest.mark.parametrize("mistake", SCHEMAS)
def test_a_mistake_of_form_is_found(mistake, release):
    plant, said = SCHEMAS[mistake]
    plant(release)
    found = [p for m in release.values() for p in schema_problems(m)]
    assert any(said in problem for problem in found), found


def test_a_trigger_of_keda_with_a_typo_is_found():
    scaled = of_kind(render("keda"), "ScaledObject")
    assert schema_problems(scaled) == []
    scaled["spec"]["maxReplicas"] = scaled["spec"].pop("maxReplicaCount")
    assert any("maxReplicas" in problem for problem in schema_problems(scaled))
