"""As much of a Kubernetes API server as helm needs: objects by HTTP, each write validated.

It has no admission, no controllers and no defaults, so nothing here ever runs: what is tested with
it is helm and the chart, not the chart on Kubernetes.
"""

from __future__ import annotations

import base64
import copy
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.deploy.schemas import VERSIONS, schema_problems

Object = dict[str, Any]

_KINDS = {
    "v1": ["Namespace", "Secret", "ConfigMap", "Service", "ServiceAccount", "Pod", "PersistentVolumeClaim"],
    "apps/v1": ["Deployment"],
    "policy/v1": ["PodDisruptionBudget"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "monitoring.coreos.com/v1": ["ServiceMonitor", "PrometheusRule"],
    "keda.sh/v1alpha1": ["ScaledObject"],
}  # fmt: skip
# What a real one refuses to change.
_IMMUTABLE = {
    "Deployment": ("selector",),
    "PersistentVolumeClaim": ("accessModes", "storageClassName"),
}
_MERGE_KEYS = {
    **dict.fromkeys(("containers", "initContainers", "volumes", "env", "imagePullSecrets"), "name"),
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
    "ports": "containerPort",
}


class Refusal(Exception):  # noqa: N818  no error of the server's
    """An HTTP status and its reason."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Cluster:
    """The objects, by plural, namespace and name.

    Attributes:
        url: where it listens.
        objects: what was written and not deleted.
    """

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[tuple[str, str, str], Object] = {}
        self._version = 0
        self.lock = threading.Lock()

    def of_release(self) -> list[Object]:
        """Return what a release has made, without what helm and the server add."""
        found = []
        for (plural, _, _), kept in sorted(self.objects.items()):
            if plural not in {"secrets", "namespaces"}:
                made = copy.deepcopy(kept)
                for key in ("uid", "resourceVersion", "creationTimestamp", "namespace"):
                    made["metadata"].pop(key, None)
                annotations = made["metadata"].pop("annotations", {})
                own = {k: v for k, v in annotations.items() if not k.startswith("meta.helm.sh/")}
                found.append(
                    made | {"metadata": made["metadata"] | ({"annotations": own} if own else {})}
                )
        return found

    def write(self, key: tuple[str, str, str], new: Object) -> Object:
        """Keep an object.

        Raises:
            Refusal: it is not valid, or changes what cannot change.
        """
        old = self.objects.get(key)
        if found := schema_problems(new, VERSIONS[1]):
            raise Refusal(422, "Invalid", f"{new['kind']} {key[2]} is invalid: {'; '.join(found)}")
        for field in _IMMUTABLE.get(new["kind"], ()) if old else ():
            if old and old["spec"].get(field) != new["spec"].get(field):
                raise Refusal(422, "Invalid", f"{new['kind']} {key[2]}: spec.{field} is immutable")
        self._version += 1
        new["metadata"] |= {
            "namespace": key[1],
            "uid": old["metadata"]["uid"] if old else str(uuid.uuid4()),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "resourceVersion": str(self._version),
        }
        if key[0] == "namespaces":
            del new["metadata"]["namespace"]
        self.objects[key] = new
        return new


def strategic_merge(old: Any, patch: Any, field: str = "") -> Any:
    """Apply a strategic merge patch; without its directives it is a JSON merge patch."""
    if isinstance(old, dict) and isinstance(patch, dict):
        kept = patch.get("$retainKeys")
        merged = {k: v for k, v in old.items() if kept is None or k in kept}
        for name, value in patch.items():
            if value is None:
                merged.pop(name, None)
            elif not name.startswith("$"):
                merged[name] = strategic_merge(merged.get(name), value, name)
        for name, order in patch.items():
            if name.startswith("$setElementOrder/"):
                field = name.partition("/")[2]
                places = [_identity(field, item) for item in order]
                merged[field].sort(key=lambda item: places.index(_identity(field, item)))
        return merged
    if isinstance(old, list) and isinstance(patch, list) and field in _MERGE_KEYS:
        return _merged_lists(old, patch, field)
    if isinstance(patch, dict):
        return strategic_merge({}, patch)
    return patch


def _merged_lists(old: list[Object], patch: list[Object], field: str) -> list[Object]:
    merged = {_identity(field, item): item for item in old}
    for item in patch:
        key = _identity(field, item)
        if item.get("$patch") == "delete":
            merged.pop(key, None)
        else:
            merged[key] = strategic_merge(merged.get(key), item)
    return list(merged.values())


def _identity(field: str, item: Object) -> Any:
    key = _MERGE_KEYS[field]
    return item[key] if key in item else item["port"]


def _twice(value: Any, field: str = "") -> set[str]:
    """Return what server-side apply refuses: items of one list with the same name."""
    if isinstance(value, dict):
        return set().union(*(_twice(item, name) for name, item in value.items()))
    if not isinstance(value, list):
        return set()
    names = [item["name"] for item in value] if _MERGE_KEYS.get(field) == "name" else []
    found = {f"{field}[name={name}]" for name in names if names.count(name) > 1}
    return found.union(*(_twice(item) for item in value))


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        if self.path.startswith("/openapi/v2"):  # empty in protobuf: what it does not name passes
            self._send(200, b"", "application/com.github.proto-openapi.spec.v2.v1.0+protobuf")
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.cluster.lock:
                status, content = 201 if self.command == "POST" else 200, self._do(body)
        except Refusal as refusal:
            status, content = refusal.status, {
                "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": refusal.status,
                "message": str(refusal), "reason": refusal.reason,
            }  # fmt: skip
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def _do(self, body: bytes) -> Object:
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        if (found := _discovery(parts)) is not None:
            return found
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = parts[1] if parts[0] == "namespaces" and len(parts) > 2 else ""
        plural, name, *_ = [*(parts[2:] if namespace else parts), ""]
        objects = self.cluster.objects
        if self.command == "GET" and not name:
            return _listed(objects, plural, namespace, parse_qs(url.query))
        sent: Object = {}
        if self.command in {"POST", "PUT", "PATCH"}:
            binary = self.headers.get("Content-Type") == "application/vnd.kubernetes.protobuf"
            sent = _secret(body) if binary else yaml.safe_load(body)
        key = (plural, namespace, name or sent.get("metadata", {}).get("name", ""))
        applied = self.headers.get("Content-Type") == "application/apply-patch+yaml"
        if self.command == "POST" and key in objects:
            raise Refusal(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
        if self.command != "POST" and key not in objects and not applied:
            raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
        match self.command:
            case "GET":
                return objects[key]
            case "DELETE":
                del objects[key]
                return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            case "PATCH" if applied and (twice := sorted(_twice(sent))):
                raise Refusal(422, "Invalid", f"duplicate entries for key {', '.join(twice)}")
            case "PATCH" if not applied:  # when applied: all there is comes from one manager, helm
                sent = strategic_merge(copy.deepcopy(objects[key]), sent)
        return self.cluster.write(key, sent)


def _discovery(parts: list[str]) -> Object | None:
    groups = [version.split("/") for version in _KINDS if "/" in version]
    match parts:
        case ["version"]:
            return {
                "major": "1",
                "minor": VERSIONS[1].split(".")[1],
                "gitVersion": f"v{VERSIONS[1]}.0",
            }
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": group, "versions": [offer], "preferredVersion": offer}
                for group, version in groups
                for offer in [{"groupVersion": f"{group}/{version}", "version": version}]
            ]}  # fmt: skip
        case ["api", version] | ["apis", _, version]:
            group = "/".join(parts[1:]) if parts[0] == "apis" else version
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": [
                {"name": _plural(kind), "kind": kind, "namespaced": kind != "Namespace",
                 "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]}
                for kind in _KINDS.get(group, [])
            ]}  # fmt: skip
        case ["openapi", "v3"]:
            return {"paths": {}}
    return None


def _plural(kind: str) -> str:
    return kind.lower()[:-1] + "ies" if kind.endswith("y") else kind.lower() + "s"


def _listed(objects: dict[Any, Object], plural: str, namespace: str, query: Any) -> Object:
    wanted = dict(p.split("=") for q in query.get("labelSelector", []) for p in q.split(","))
    items = [
        kept
        for (kind, where, _), kept in objects.items()
        if (kind, where) == (plural, namespace)
        and wanted.items() <= kept["metadata"].get("labels", {}).items()
    ]
    kinds = {_plural(kind): (version, kind) for version in _KINDS for kind in _KINDS[version]}
    version, kind = kinds.get(plural, ("v1", ""))  # of others there are none
    return {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items}


def _secret(body: bytes) -> Object:
    """Read the one thing that helm sends as protobuf: the Secret in which it keeps a release."""
    raw = dict(_fields(body[4:]))[2]  # after a magic number, in an envelope
    metadata = list(_fields(dict(_fields(raw))[1]))
    entries = [dict(_fields(entry)) for number, entry in _fields(raw) if number == 2]
    labels = [dict(_fields(entry)) for number, entry in metadata if number == 11]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": dict(metadata)[1].decode(),
            "labels": {entry[1].decode(): entry[2].decode() for entry in labels},
        },
        "data": {entry[1].decode(): base64.b64encode(entry[2]).decode() for entry in entries},
        "type": dict(_fields(raw))[3].decode(),
    }


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Return number and content of the fields of a protobuf message: integers or bytes."""
    rest = iter(message)

    def integer() -> int:
        value, shift = 0, 0
        for byte in rest:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return value

    while tag := integer():
        number, kind = tag >> 3, tag & 7
        yield number, integer() if kind == 0 else bytes(islice(rest, integer()))


@contextmanager
def serving() -> Iterator[Cluster]:
    """Serve an empty cluster on a loopback port."""
    cluster = Cluster()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster})
    )
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    cluster.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield cluster
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
