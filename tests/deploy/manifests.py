"""What schemas do not see in manifests: references that lead nowhere, values that make no sense.

`problems` takes all manifests of a release, since most mistakes are between two of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Manifest = dict[str, Any]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123
_SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, which older API servers ask
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")
_POWERS = {"m": 1e-3} | {
    prefix + suffix: float(base ** (power + 1))
    for power, prefix in enumerate("KMGTPE")
    for suffix, base in (("i", 1024), ("", 1000))
}
_SECRET = re.compile(r"(TOKEN|_KEY|SECRET|PASSWORD)$")
_CONFIG_MAP_BYTES = 1 << 20
_TEARDOWN_S = 5

# By the name of the field, anywhere.
_ENUMS: dict[str, set[str]] = {
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "medium": {"", "Memory", "HugePages"},
    "unhealthyPodEvictionPolicy": {"AlwaysAllow", "IfHealthyBudget"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
}
_LISTED_ENUMS: dict[str, set[str]] = {
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "policyTypes": {"Ingress", "Egress"},
}
_TYPES: dict[str, set[str]] = {
    "Service": {"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"},
    "Deployment": {"RollingUpdate", "Recreate"},
}
_SCALERS = {
    "HorizontalPodAutoscaler": ("minReplicas", "maxReplicas"),
    "ScaledObject": ("minReplicaCount", "maxReplicaCount"),
}
_PORT_FIELDS = {"port", "containerPort", "targetPort", "nodePort", "hostPort"}


def problems(manifests: Iterable[Manifest]) -> list[str]:
    """Return the mistakes in the manifests of one release, each a sentence that names its place."""
    release = list(manifests)
    found = [f"{_title(m)}: {problem}" for m in release for problem in _alone(m)]
    found += [f"{_title(m)}: {problem}" for m in release for problem in _among(m, release)]
    names = [_title(m) for m in release]
    return found + [
        f"{name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]


def quantity(text: object) -> float:
    """Return the number that a Kubernetes quantity is.

    Raises:
        ValueError: it is none.
    """
    if not _QUANTITY.fullmatch(str(text)):
        raise ValueError(f"{text!r} is no quantity")
    digits = re.match(r"[\d.]+", str(text))
    assert digits
    suffix = str(text)[digits.end() :]
    return float(digits[0]) * (_POWERS[suffix.replace("k", "K")] if suffix else 1)


def pod_spec(manifest: Manifest) -> Manifest | None:
    """Return the pod that a manifest makes."""
    if manifest["kind"] == "Pod":
        return manifest["spec"]
    return manifest["spec"]["template"]["spec"] if manifest["kind"] == "Deployment" else None


def _title(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def _alone(manifest: Manifest) -> Iterator[str]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    yield from _names(manifest)
    yield from _fields(manifest)
    if kind in _TYPES:
        chosen = (spec.get("strategy", {}) if kind == "Deployment" else spec).get("type")
        if chosen is not None and chosen not in _TYPES[kind]:
            yield f"type {chosen!r} is not one of {sorted(_TYPES[kind])}"
    if kind == "Deployment":
        yield from _deployment(spec)
    if kind == "ConfigMap" and (size := len(str(manifest.get("data")))) >= _CONFIG_MAP_BYTES:
        yield f"{size} bytes are more than a ConfigMap holds"
    if kind in _SCALERS:
        fields = _SCALERS[kind]
        if spec[fields[0]] > spec[fields[1]]:
            yield f"{fields[0]} {spec[fields[0]]} is above {fields[1]} {spec[fields[1]]}"
    if (pod := pod_spec(manifest)) is not None:
        yield from _pod(pod)


def _names(manifest: Manifest) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    strict = manifest["kind"] == "Service"
    if not (_SERVICE if strict else _SUBDOMAIN).fullmatch(name) or len(name) > (
        63 if strict else 253
    ):
        yield f"{name!r} is no name for it"
    for path, value in _walk(manifest):
        if path[-1] in {"labels", "matchLabels", "nodeSelector"} and isinstance(value, dict):
            for key, label in value.items():
                if (
                    not isinstance(label, str)
                    or len(label) > 63
                    or not _LABEL_VALUE.fullmatch(label)
                ):
                    yield f"label {key} has the impossible value {label!r}"


def _fields(manifest: Manifest) -> Iterator[str]:
    for path, value in _walk(manifest):
        field, where = path[-1], ".".join(path)
        if isinstance(value, str) and value not in _ENUMS.get(field, {value}):
            yield f"{where} is {value!r}, not one of {sorted(_ENUMS[field])}"
        if field in _LISTED_ENUMS and isinstance(value, list):
            yield from (f"{where} has {v!r}" for v in value if v not in _LISTED_ENUMS[field])
        if field in _PORT_FIELDS and isinstance(value, int) and not 0 < value < 65536:
            yield f"{where} {value} is no port"
        if field in {"requests", "limits"} and isinstance(value, dict):
            for name, amount in value.items():
                yield from _not_a_quantity(f"{where}.{name}", amount)
        if field in {"sizeLimit", "averageValue"}:
            yield from _not_a_quantity(where, value)


def _not_a_quantity(where: str, value: object) -> Iterator[str]:
    try:
        quantity(value)
    except ValueError as error:
        yield f"{where}: {error}"


def _deployment(spec: Manifest) -> Iterator[str]:
    labels = spec["template"]["metadata"].get("labels", {})
    if not _selects(spec["selector"], labels):
        yield f"its selector {spec['selector']} does not match its pods' labels {labels}"
    rolling = spec.get("strategy", {}).get("rollingUpdate", {})
    if {str(rolling.get(k, 1)).rstrip("%") for k in ("maxSurge", "maxUnavailable")} == {"0"}:
        yield "no rollout can begin with maxSurge 0 and maxUnavailable 0"
    if rolling and spec["strategy"].get("type") == "Recreate":
        yield "rollingUpdate with type Recreate"
    for container in spec["template"]["spec"]["containers"]:
        probe = container.get("startupProbe")
        if probe and spec.get("progressDeadlineSeconds", 600) <= _seconds(probe):
            yield f"progressDeadlineSeconds ends before the start-up budget of {_seconds(probe)} s"


def _pod(pod: Manifest) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    yield from _twice("volume", volumes)
    yield from (f"volume name {v!r} is no name" for v in volumes if not _LABEL.fullmatch(v))
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    yield from _twice("container", [container["name"] for container in containers])
    used = {mount["name"] for c in containers for mount in c.get("volumeMounts", [])}
    yield from (f"volume {name} is mounted nowhere" for name in volumes if name not in used)
    for container in containers:
        for problem in _container(container, pod, volumes):
            yield f"container {container['name']}: {problem}"


def _container(container: Manifest, pod: Manifest, volumes: list[str]) -> Iterator[str]:
    mounts = container.get("volumeMounts", [])
    yield from (f"volume {m['name']} is not defined" for m in mounts if m["name"] not in volumes)
    yield from _twice("mount at", [mount["mountPath"] for mount in mounts])
    yield from _twice("variable", [variable["name"] for variable in container.get("env", [])])
    for variable in container.get("env", []):
        if _SECRET.search(variable["name"]) and "value" in variable:
            yield f"variable {variable['name']} is a secret in plain text"
    security = pod.get("securityContext", {}) | container.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        yield "may run as root"
    if not security.get("readOnlyRootFilesystem"):
        yield "may write to its root file system"
    if security.get("allowPrivilegeEscalation", True):
        yield "may gain privileges"
    yield from _resources(container.get("resources", {}))
    yield from _probes(container)
    yield from _shutdown(container, pod.get("terminationGracePeriodSeconds", 30))


def _resources(resources: Manifest) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in sorted(requests.keys() | limits.keys()):
        request, limit = requests.get(name), limits.get(name)
        if "/" in name and (limit is None or (request is not None and str(request) != str(limit))):
            yield f"{name}: request {request} and limit {limit} must be equal"
        try:
            if None not in (request, limit) and quantity(request) > quantity(limit):
                yield f"{name}: request {request} is above limit {limit}"
        except ValueError:
            continue  # said already


def _probes(container: Manifest) -> Iterator[str]:
    ports = container.get("ports", [])
    known = {p.get("name") for p in ports} | {p["containerPort"] for p in ports}
    names = [port["name"] for port in ports if "name" in port]
    yield from (
        f"port name {n!r} is no name" for n in names if not _LABEL.fullmatch(n) or len(n) > 15
    )
    for field in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container.get(field, {}).get("httpGet") or container.get(field, {}).get("tcpSocket")
        if asked and asked["port"] not in known:
            yield f"{field} asks port {asked['port']}, which it does not have"
    if {"readinessProbe", "livenessProbe"} <= container.keys():
        ready, live = container["readinessProbe"], container["livenessProbe"]
        if _seconds(live) <= _seconds(ready):
            yield "livenessProbe is no more patient than readinessProbe"


def _shutdown(container: Manifest, grace: int) -> Iterator[str]:
    drain = [re.fullmatch(r"--shutdown-timeout=(\d+)", a) for a in container.get("args", [])]
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    needed = (
        sleep + sum(int(match[1]) for match in drain if match) + (_TEARDOWN_S if any(drain) else 0)
    )
    if needed > grace:
        yield f"is killed after {grace} s, while it takes up to {needed} s to drain"


def _among(manifest: Manifest, release: list[Manifest]) -> Iterator[str]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    targets = [m for m in release if m["kind"] == "Deployment"]
    pods = [m["spec"]["template"]["metadata"].get("labels", {}) for m in targets]
    selector = {
        "Service": lambda: {"matchLabels": spec["selector"]},
        "PodDisruptionBudget": lambda: spec["selector"],
        "NetworkPolicy": lambda: spec["podSelector"],
    }.get(kind)
    if selector and not any(_selects(selector(), labels) for labels in pods):
        yield f"selects no pod: {selector()}"
    ports = [
        p
        for t in targets
        for c in t["spec"]["template"]["spec"]["containers"]
        for p in c.get("ports", [])
    ]
    known = {p.get("name") for p in ports} | {p["containerPort"] for p in ports}
    if kind == "Service":
        wanted = [port.get("targetPort", port["port"]) for port in spec["ports"]]
        yield from (
            f"targetPort {port} is no port of a pod" for port in wanted if port not in known
        )
    if kind == "NetworkPolicy":
        if not all(rule.get("from") for rule in spec.get("ingress", [])):
            yield "an ingress rule without `from` lets everybody in"
        wanted = [p["port"] for rule in spec.get("ingress", []) for p in rule.get("ports", [])]
        yield from (
            f"ingress port {port} is no port of a pod" for port in wanted if port not in known
        )
    if kind == "ServiceMonitor":
        yield from _monitor(spec, release)
    if kind == "Deployment":
        constraints = spec["template"]["spec"].get("topologySpreadConstraints", [])
        if not all(
            any(_selects(c["labelSelector"], labels) for labels in pods) for c in constraints
        ):
            yield "a topologySpreadConstraint selects none of its pods"
    if (pod := pod_spec(manifest)) is not None:
        yield from _references(pod, release)
    if kind in _SCALERS:
        yield from _scaler(spec["scaleTargetRef"]["name"], release)


def _scaler(target: str, release: list[Manifest]) -> Iterator[str]:
    targets = [m for m in release if _title(m) == f"Deployment {target}"]
    if not targets:
        yield f"scales {target}, which is not there"
    yield from (f"{target} has replicas of its own" for t in targets if "replicas" in t["spec"])
    if len([m for m in release if m["kind"] in _SCALERS]) > 1:
        yield f"is one of two autoscalers of {target}"


def _monitor(spec: Manifest, release: list[Manifest]) -> Iterator[str]:
    services = [
        m
        for m in release
        if m["kind"] == "Service" and _selects(spec["selector"], m["metadata"].get("labels", {}))
    ]
    if not services:
        yield f"selects no Service: {spec['selector']}"
    ports = {port.get("name") for service in services for port in service["spec"]["ports"]}
    for endpoint in spec["endpoints"]:
        if endpoint["port"] not in ports:
            yield f"scrapes port {endpoint['port']}, which no Service has"
        if _duration(endpoint["scrapeTimeout"]) > _duration(endpoint["interval"]):
            yield f"scrapeTimeout {endpoint['scrapeTimeout']} is above interval {endpoint['interval']}"


def _references(pod: Manifest, release: list[Manifest]) -> Iterator[str]:
    """Only to what a release is bound to make: names that begin with one of its own."""
    mine = {(m["kind"], m["metadata"]["name"]) for m in release}
    owner = [name for kind, name in mine if kind == "Deployment"]
    wanted = [
        *(
            ("PersistentVolumeClaim", v["persistentVolumeClaim"]["claimName"])
            for v in pod.get("volumes", [])
            if "persistentVolumeClaim" in v
        ),
        *(
            ("ConfigMap", v["configMap"]["name"])
            for v in pod.get("volumes", [])
            if "configMap" in v
        ),
        ("ServiceAccount", pod.get("serviceAccountName", "")),
    ]
    for kind, name in wanted:
        if (kind, name) not in mine and any(name.startswith(prefix) for prefix in owner):
            yield f"{kind} {name} is not there"


def _walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if path:
        yield path, value
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from _walk(item, (*path, str(key)))


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return bool(wanted) and wanted.items() <= labels.items()


def _twice(what: str, names: list[str]) -> Iterator[str]:
    yield from (
        f"{what} {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})
    )


def _seconds(probe: Manifest) -> int:
    return int(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def _duration(text: str) -> float:
    unit = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    return sum(float(n) * unit[u] for n, u in re.findall(r"(\d+)(ms|s|m|h)", text))
