"""The life of a release: the real helm 3 and 4 against a stand-in for the API server.

What is in the stand-in afterwards must be what `helm template` says: each change must reach the
objects that are there, by whatever patches helm makes of it. No pod ever runs here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.api_server import Cluster, serving
from tests.deploy.charts import CHART, HELMS, VALUES, ChartError, helm, render, server

Run = Callable[..., str]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with serving() as found:
        yield found


@pytest.fixture(params=HELMS)
def by(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(by: str, cluster: Cluster, tmp_path: Path) -> Run:
    """Runs a command of helm on the release `lego` in the namespace `llm`."""
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": cluster.url}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}
    environment |= {
        f"HELM_{kind}_HOME": str(tmp_path / kind) for kind in ("CACHE", "CONFIG", "DATA")
    }

    def command(verb: str, *arguments: str) -> str:
        return helm(
            by, *verb.split(), "lego", *arguments, "--namespace=llm", environment=environment
        )

    return command


def _values(name: str, changes: dict[str, Any] | None = None) -> list[str]:
    sets = [f"--set-json={key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    return [str(CHART), f"--values={VALUES[name]}", *sets]


def _made(name: str, changes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return what should be there; hooks come and go."""
    return _sorted(m for m in render(name, changes) if m["kind"] != "Pod")


def _sorted(manifests: Any) -> list[dict[str, Any]]:
    return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))


def _statuses(run: Run) -> list[str]:
    return [revision["status"] for revision in json.loads(run("history", "--output=json"))]


@pytest.mark.parametrize("values", ["everything", "keda"])
def test_install_and_uninstall(values, run, cluster):
    run("install", *_values(values), "--create-namespace")
    assert _sorted(cluster.of_release()) == _made(values)
    run("uninstall")
    kept = {m["metadata"]["name"] for m in cluster.of_release()}
    assert kept == ({"lego-llm-models", "lego-llm-store"} if values == "everything" else set())


CHANGES: dict[str, Any] = {
    "replicaCount": 5,
    "vllmConfig.shutdownTimeout": 900,
    "lego.maxAdapters": 4,
    "store.type": "none",
    "lego.storeBytes": None,
    "resources.limits": {"nvidia.com/gpu": 4},
    "resources.requests": {"nvidia.com/gpu": 4},
    "vllmConfig.tensorParallelSize": 4,
    "podLabels": {"team": "ml"},
    "topologySpreadConstraints": [],
    "servicePort": 8000,
    "vllmApiKey.secretName": "clients",
    "serviceMonitor.enabled": True,
    "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
}


def test_upgrade_and_rollback(run, cluster):
    run("install", *_values("shared-store"), "--create-namespace")
    before = _made("shared-store")
    run("upgrade", *_values("shared-store", CHANGES))
    after = _made("shared-store", CHANGES)
    assert _sorted(cluster.of_release()) == after
    assert {m["kind"] for m in before} ^ {m["kind"] for m in after} == {
        *("PersistentVolumeClaim", "ServiceMonitor"),
    }
    run("rollback", "1")
    assert _sorted(cluster.of_release()) == before
    assert _statuses(run) == ["superseded", "superseded", "deployed"]
    run("uninstall")
    assert cluster.of_release() == []


def test_variables_in_place_of_the_charts(run, cluster):
    """A second one of the same name would be refused by server-side apply, helm 4's."""
    change = {"env": [{"name": "HOME", "value": "/home/vllm/server"}]}
    run("install", *_values("minimal"), "--create-namespace")
    run("upgrade", *_values("minimal", change))
    assert _sorted(cluster.of_release()) == _made("minimal", change)
    assert [v for v in server(cluster.of_release())["env"] if v["name"] == "HOME"] == change["env"]


def test_between_the_autoscalers(run, cluster):
    """One goes as the other comes, and the replicas are never set again."""
    run("install", *_values("everything"), "--create-namespace")
    changes = {"autoscaling.enabled": False, "keda.enabled": True}
    run("upgrade", *_values("everything", changes))
    assert _sorted(cluster.of_release()) == _made("everything", changes)
    kinds = {m["kind"] for m in cluster.of_release()}
    assert "ScaledObject" in kinds
    assert "HorizontalPodAutoscaler" not in kinds


REJECTED = {
    "a field that does not exist": ({"affinity": {"gpuAffinity": {}}}, "gpuAffinity"),
    "a field that cannot change": (
        {"nameOverride": "llm", "fullnameOverride": "lego-vllm-lego"},
        "spec.selector is immutable",
    ),
}


@pytest.mark.parametrize("why", REJECTED)
def test_a_rejected_upgrade_leaves_the_server_alone(why, run, cluster):
    changes, said = REJECTED[why]
    run("install", *_values("minimal"), "--create-namespace")
    (before,) = (m for m in cluster.of_release() if m["kind"] == "Deployment")
    with pytest.raises(ChartError) as rejected:
        run("upgrade", *_values("minimal", changes))
    assert said in str(rejected.value)
    assert _statuses(run) == ["deployed", "failed"]
    assert before in cluster.of_release()
    run("rollback", "1")
    assert _sorted(cluster.of_release()) == _made("minimal")


def test_the_notes_line_can_be_pasted(run):
    run("install", *_values("everything"), "--create-namespace")
    notes = run("get notes")
    start = notes.index("curl localhost:8000/v1/chat")
    line = notes[start : notes.index("\n\n", start)]
    script = f'KEY=k; curl() {{ printf "%s\\0" "$@"; }}; {line}'
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    url, *_, body, _ = printed.stdout.split("\0")
    assert url == "localhost:8000/v1/chat/completions"
    assert json.loads(body)["messages"][0]["content"] == 'What\'s the plural of "city"?'
    assert "authorization: Bearer k" in printed.stdout
    assert "get secret clients -o jsonpath='{.data.api\\.key}'" in notes
