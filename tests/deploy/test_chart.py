"""The Helm chart: what the real helm 3 and 4 make of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lego_core.adapter_config import CONFIG_FILE
from tests.deploy.charts import (
    CHART,
    HELMS,
    VALUES,
    ChartError,
    helm,
    of_kind,
    plain_environment,
    pod,
    render,
    server,
)
from tests.deploy.manifests import problems
from tests.deploy.schemas import VERSIONS, schema_problems
from tests.deploy.tools import ROOT
from tests.hub_server import NEW, OLD, REPO, Hub, plain
from vllm_lego.demo.server import shipped_adapters
from vllm_lego.policy import read_policy
from vllm_lego.serve import plan
from vllm_lego.settings import Settings, size

EVERY = pytest.mark.parametrize("values", VALUES)
BOTH = pytest.mark.parametrize("by", HELMS)
USUAL = {"ServiceAccount", "PodDisruptionBudget", "Pod"}
MADE = {  # what each values file must make, beside Deployment and Service
    "minimal": USUAL,
    "cpu": USUAL,
    "keda": {"ScaledObject", "ServiceMonitor", "NetworkPolicy", "ConfigMap"},
    "shared-store": USUAL | {"PersistentVolumeClaim"},
    "everything": {
        *USUAL,
        *("PersistentVolumeClaim", "ConfigMap", "NetworkPolicy", "HorizontalPodAutoscaler"),
        *("ServiceMonitor", "PrometheusRule"),
    },
}


def _generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", CHART.parent / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generate()


@BOTH
@EVERY
def test_lint_has_nothing_to_say(by, values):
    helm(by, "lint", "--strict", str(CHART), f"--values={VALUES[values]}")


@EVERY
def test_what_it_makes_is_valid(values):
    manifests = render(values)
    assert {m["kind"] for m in manifests} == {"Deployment", "Service"} | MADE[values]
    assert [p for v in VERSIONS for m in manifests for p in schema_problems(m, v)] == []
    assert problems(manifests) == []
    assert render(values, by="helm3") == manifests


def test_generating_again_changes_nothing():
    for path, content in GENERATE.generated().items():
        assert path.read_text() == content, f"run {Path(GENERATE.__file__).relative_to(ROOT)}"


def test_no_value_goes_untested():
    """Each is set in one of the values files that these tests render."""

    def leaves(values: dict[str, Any], path: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            name = f"{path}.{key}" if path else key
            found |= leaves(value, name) if isinstance(value, dict) and value else {name}
        return found

    defaults = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
    given = set().union(*(leaves(yaml.safe_load(file.read_text())) for file in VALUES.values()))
    untouched = {d for d in defaults if not any(g == d or g.startswith(d + ".") for g in given)}
    # Kept as they are by everybody: what the chart's security rests on.
    assert [u for u in sorted(untouched) if not u.startswith(("securityC", "podSecurityC"))] == []


@pytest.mark.parametrize("setting", dataclasses.fields(Settings), ids=lambda s: s.name)
def test_each_setting_reaches_the_plugin(setting):
    kind = setting.metadata["kind"]
    given: dict[Any, list[Any]] = {
        size: ["3GiB", "5MB", 12_345_678_901],
        int: [7, 3_000_000],
        float: [0.25, 90, 1_500_000.5],
        str: ["/a b/c, d"],
    }
    for value in given[kind]:
        change = {f"lego.{GENERATE.value_name(setting.name)}": value, "store.size": "20Ti"}
        found = Settings.from_environment(plain_environment(server(render(changes=change))))
        wanted = size(str(value)) if kind is size else value
        default = Settings(store_dir="/store")
        assert found == dataclasses.replace(default, **{setting.name: wanted})


def test_by_default_the_settings_are_the_plugins():
    for by in HELMS:
        environment = plain_environment(server(render("minimal", by=by)))
        assert Settings.from_environment(environment) == Settings(store_dir="/store")


def test_everything_is_what_the_file_says():
    environment = plain_environment(server(render("everything")))
    given = yaml.safe_load(VALUES["everything"].read_text())["lego"]
    names = {GENERATE.value_name(s.name): s for s in dataclasses.fields(Settings)}
    wanted = {
        names[k].name: v if names[k].metadata["kind"] is not size else size(str(v))
        for k, v in given.items()
    }
    folders = {
        "adapter_dir": "/adapters",
        "store_dir": "/store",
        "policy_file": "/etc/vllm-lego/policy.toml",
    }
    assert Settings.from_environment(environment) == Settings(**wanted, **folders)
    assert set(wanted | folders) == {s.name for s in dataclasses.fields(Settings)}


@pytest.fixture(scope="module")
def vllm_parser() -> Any:
    """The parser of `vllm serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: PLC0415  slow
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    return make_arg_parser(FlexibleArgumentParser())


@EVERY
def test_the_command_line_is_accepted(values, vllm_parser, tmp_path):
    """By `vllm-lego serve` first, then by vLLM; the pod's folders are elsewhere here."""
    manifests = render(values)
    container = server(manifests)
    environment = plain_environment(container)
    for adapter in shipped_adapters().values():
        (tmp_path / "adapters" / adapter.name).mkdir(parents=True)
        for file in adapter.iterdir():
            (tmp_path / "adapters" / adapter.name / file.name).symlink_to(file)
    if environment.pop("VLLM_LEGO_POLICY_FILE", None):
        for policy in (m for m in manifests if m["metadata"]["name"].endswith("-policy")):
            (tmp_path / "policy.toml").write_text(policy["data"]["policy.toml"])
            environment["VLLM_LEGO_POLICY_FILE"] = str(tmp_path / "policy.toml")
            assert len(read_policy(Settings.from_environment(environment)).rules) == 1
    if "VLLM_LEGO_ADAPTER_DIR" in environment:
        environment["VLLM_LEGO_ADAPTER_DIR"] = str(tmp_path / "adapters")
    launch = plan(container["args"], environment)
    options = vllm_parser.parse_args(launch.arguments)
    given = yaml.safe_load(VALUES[values].read_text())
    assert options.model_tag == given["modelURL"]
    assert options.port == container["ports"][0]["containerPort"]
    assert options.enable_lora
    for key, value in given.get("vllmConfig", {}).items():
        if key != "extraArgs":
            snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in key)
            assert getattr(options, snake) == value, key
    modules = [(m.name, m.path) for m in options.lora_modules or []]
    assert modules == [(m["name"], m["path"]) for m in given.get("loraModules", [])]


def test_secrets_come_by_reference_and_nothing_else():
    container = server(render("everything"))
    secrets = {
        v["name"]: v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v
    }
    assert secrets == {
        "VLLM_API_KEY": {"name": "clients", "key": "api.key"},
        "HF_TOKEN": {"name": "hub", "key": "hf"},
        "AWS_SECRET_KEY": {"name": "s3", "key": "secret"},
    }
    # Those who fetch and try need one each.
    init = pod(render("everything"))["initContainers"][0]
    assert {v["name"] for v in init["env"] if "valueFrom" in v} == {"HF_TOKEN"}
    hook = of_kind(render("everything"), "Pod")["spec"]["containers"][0]
    assert {v["name"] for v in hook["env"] if "valueFrom" in v} == {"VLLM_API_KEY"}


def test_the_folders_that_may_be_written():
    manifests = render("shared-store")
    mounts = {m["mountPath"]: m for m in server(manifests)["volumeMounts"]}
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    home = {"/home/vllm", "/home/vllm/.cache"}
    assert writable == home | {"/tmp", "/dev/shm", "/models", "/store"}  # noqa: S108
    assert mounts["/adapters"]["subPath"] == "production"
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"]
        for v in pod(manifests)["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert claims == {"models": "models", "adapters": "adapters", "store": "lego-vllm-lego-store"}
    assert of_kind(manifests, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_only_init_containers_put_adapters_into_their_folder():
    for values, fill in ("everything", True), ("minimal", True), ("shared-store", False):
        manifests = render(values, {"initContainers": [{"name": "warm", "command": ["true"]}]})
        for container in (server(manifests), *pod(manifests)["initContainers"]):
            (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/adapters")
            assert mount.get("readOnly", False) != (fill and container["name"] != "vllm")


def test_sizes_in_parts():
    render("minimal", {"store.size": "1.5Ti", "lego.storeBytes": "1536GiB"})
    with pytest.raises(ChartError, match="cannot hold"):
        render("minimal", {"store.size": "1.5Ti", "lego.storeBytes": 1536 * 2**30 + 1})


@pytest.mark.parametrize(
    "claim", [{"adapters.existingClaim": "a"}, {"pvcExistingClaim": "a"}, {"pvcStorage": "9Gi"}]
)
def test_a_rollout_does_not_wait_for_a_claim_that_the_old_pod_has(claim):
    declared = {"adapters.accessModes": ["ReadWriteMany"], "pvcAccessMode": ["ReadWriteMany"]}
    for changes, kind in (claim, "Recreate"), (claim | declared, "RollingUpdate"):
        strategy = of_kind(render("minimal", changes), "Deployment")["spec"]["strategy"]
        assert strategy["type"] == kind


def test_time_to_start_and_to_end():
    manifests = render("minimal")
    container, deployment = server(manifests), of_kind(manifests, "Deployment")["spec"]
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] == 30 * 60
    probes = [
        container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    ]
    assert probes == ["/health"] * 3
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 15
    assert deployment["progressDeadlineSeconds"] > 30 * 60
    assert pod(manifests)["terminationGracePeriodSeconds"] == 15 + 300 + 30
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_the_test_pod_may_ask_and_is_not_asked():
    manifests = render("everything")
    labels = of_kind(manifests, "Pod")["metadata"]["labels"].items()
    (rule,) = of_kind(manifests, "NetworkPolicy")["spec"]["ingress"]
    allowed = [
        peer["podSelector"]["matchLabels"].items() for peer in rule["from"] if "podSelector" in peer
    ]
    assert any(selector <= labels for selector in allowed)
    assert not of_kind(manifests, "Service")["spec"]["selector"].items() <= labels


def test_a_network_policy_lets_in_the_namespace_by_itself():
    (rule,) = of_kind(render("keda"), "NetworkPolicy")["spec"]["ingress"]
    assert {"podSelector": {}} in rule["from"]
    assert not any("namespaceSelector" in peer or "ipBlock" in peer for peer in rule["from"])


def test_an_autoscaler_has_the_replicas_to_itself():
    assert of_kind(render("shared-store"), "Deployment")["spec"]["replicas"] == 3
    for values in ("everything", "keda"):
        assert "replicas" not in of_kind(render(values), "Deployment")["spec"]


def test_other_rules_make_other_pods():
    """They are read at start, so a change must start new ones."""
    change = {"policy": '[[allow]]\nadapters = ["*"]\n'}
    one, other = (of_kind(render("everything", c), "Deployment") for c in ({}, change))
    annotations = [d["spec"]["template"]["metadata"]["annotations"] for d in (one, other)]
    assert annotations[0]["checksum/policy"] != annotations[1]["checksum/policy"]


def test_rules_and_dashboard_arrive_as_they_are():
    manifests = render("everything")
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    assert of_kind(manifests, "PrometheusRule")["spec"] == rules
    assert "$labels" in json.dumps(rules)
    (board,) = (m for m in manifests if m["metadata"]["name"].endswith("-dashboard"))
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["data"]["vllm-lego.json"] == (CHART / "files" / "dashboard.json").read_text()


def test_the_init_container_fetches_adapters(hub: Hub, tmp_path):
    hub.push(OLD, plain(1))
    hub.push(NEW, plain(2), branch="v1.2")
    (download,) = (
        c for c in pod(render("everything"))["initContainers"] if c["name"] == "adapters"
    )
    wanted = json.loads(plain_environment(download)["ADAPTERS"])
    for adapter in wanted:  # from the only repository of the local hub
        adapter["repository"] = REPO
    environment = os.environ | {
        "ADAPTERS": json.dumps(wanted),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "models"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *download["command"][1:-1], str(tmp_path / "adapters")]
    subprocess.run(command, env=environment, check=True)
    for name, files in {"sql": plain(2), "json_mode": plain(1)}.items():
        folder = tmp_path / "adapters" / name
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == files
        assert not (folder / CONFIG_FILE).is_symlink()


def test_the_cpu_values_need_no_gpu():
    resources = server(render("cpu"))["resources"]
    assert {name for amounts in resources.values() for name in amounts} == {"cpu", "memory"}
