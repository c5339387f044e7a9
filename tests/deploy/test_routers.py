"""The configurations of deploy/routers: of the right shape, and true of what they configure."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from vllm_router.launch_router import parse_router_args

from benchmarks.affinity.replicas import affinity_key
from tests.deploy.tools import ROOT
from vllm_lego.settings import Settings, flag_name, variable_name

ROUTERS = ROOT / "deploy" / "routers"
DOCUMENT = ROOT / "deploy" / "REPLICAS.md"
KUBERNETES = ("1.32", "1.34", "1.37")
PODS = {"app.kubernetes.io/name": "vllm-lego", "app.kubernetes.io/component": "server"}
CORE = ("v1", "apps/v1", "rbac.authorization.k8s.io/v1")

# Field names as read in the projects' own files. A key ends in ! where it is required, None stands for
# any content, a list for a list of such things.
INFERENCE_POOL = {  # Gateway API Inference Extension v1.6.0, InferencePool v1
    "selector!": {"matchLabels!": None},
    "targetPorts!": [{"number!": None}],
    "appProtocol": None,
    "endpointPickerRef": {
        "name!": None,
        "group": None,
        "kind": None,
        "port": {"number!": None},
        "failureMode": None,
    },
}
HTTP_ROUTE = {  # Gateway API v1
    "parentRefs": [{"group": None, "kind": None, "name!": None, "namespace": None}],
    "hostnames": None,
    "rules": [
        {
            "matches": [{"path": {"type": None, "value": None}, "headers": None}],
            "backendRefs": [{"group": None, "kind": None, "name!": None, "port": None}],
            "timeouts": {"request": None, "backendRequest": None},
        }
    ],
}
SPECS = {
    ("inference.networking.k8s.io/v1", "InferencePool"): INFERENCE_POOL,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTP_ROUTE,
}
PICKER = {  # llm-d router v0.10.0, EndpointPickerConfig llm-d.ai/v1alpha1
    "apiVersion!": None,
    "kind!": None,
    "plugins!": [{"type!": None, "name": None, "parameters": None}],
    "schedulingProfiles!": [{"name!": None, "plugins!": [{"pluginRef!": None, "weight": None}]}],
}
SESSION_AFFINITY = {  # its plugin session-affinity-scorer
    "strategy": None,
    "profileName": None,
    "sessionIdConfig": {
        "sources": [{"header": None}],
        "evictionTtlSeconds": None,
        "evictionSweepSeconds": None,
    },
}
LLM_D = {  # llm-d router v0.10.0, chart llm-d-router-gateway
    "router!": {
        "modelServers!": {"matchLabels!": None, "targetPorts": [{"number!": None}]},
        "inferencePool": {"create": None, "failureMode": None},
        "epp": {
            "replicas": None,
            "image": {"registry": None, "repository": None, "tag": None},
            "pluginsConfigFile": None,
            "pluginsCustomConfig": None,
        },
    },
    "httpRoute": {"create": None, "inferenceGatewayName": None, "requestTimeout": None},
}
PRODUCTION_STACK = {  # chart vllm-stack 0.1.12
    "servingEngineSpec!": {
        "vllmApiKey": {"secretName!": None, "secretKey!": None},
        "startupProbe": None,
        "modelSpec!": [
            {
                "name!": None,
                "repository!": None,
                "tag!": None,
                "modelURL!": None,
                "replicaCount!": None,
                "requestCPU": None,
                "requestMemory": None,
                "requestGPU": None,
                "shmSize": None,
                "enableLoRA": None,
                "hf_token": {"secretName!": None, "secretKey!": None},
                "vllmConfig": {
                    "enablePrefixCaching": None,
                    "maxModelLen": None,
                    "maxLoras": None,
                    "extraArgs": None,
                },
                "env": None,
                "extraVolumes": None,
                "extraVolumeMounts": None,
            }
        ],
    },
    "routerSpec!": {"routingLogic!": None, "sessionKey": None},
}
VALUES = {"llm-d": LLM_D, "production-stack": PRODUCTION_STACK}


class StrictLoader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML libraries keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice, {node.start_mark}"
        return super().construct_mapping(node, deep=deep)


def load(path: Path) -> list[Any]:
    return list(yaml.load_all(path.read_text(), StrictLoader))


def resources() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(ROUTERS.rglob("*.yaml")):
        if path.name != "values.yaml":
            for found in load(path):
                yield f"{path.parent.name}-{found['kind']}", found


def faults(value: Any, fields: Any, where: str) -> Iterator[str]:
    """Tell what in a value is not as the fields say."""
    if isinstance(fields, list):
        assert isinstance(value, list), f"{where} is no list"
        for number, item in enumerate(value):
            yield from faults(item, fields[0], f"{where}[{number}]")
    elif isinstance(fields, dict):
        assert isinstance(value, dict), f"{where} is no mapping"
        known = {name.rstrip("!"): of for name, of in fields.items()}
        yield from (f"{where}.{name} is unknown" for name in value if name not in known)
        required = (name.rstrip("!") for name in fields if name.endswith("!"))
        yield from (f"{where}.{name} is missing" for name in required if name not in value)
        for name in value.keys() & known.keys():
            yield from faults(value[name], known[name], f"{where}.{name}")


def resource(folder: str, kind: str) -> dict[str, Any]:
    return dict(resources())[f"{folder}-{kind}"]


@pytest.mark.parametrize(("name", "found"), list(resources()), ids=lambda value: str(value)[:40])
def test_a_resource_is_of_the_right_shape(name, found):
    spec = SPECS.get((found["apiVersion"], found["kind"]))
    if spec is not None:
        assert list(faults(found["spec"], spec, name)) == []
    else:
        assert found["apiVersion"] in CORE, f"{name} is checked against nothing"
        for version in KUBERNETES:
            kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("folder", VALUES)
def test_values_have_the_names_of_the_chart(folder):
    (values,) = load(ROUTERS / folder / "values.yaml")
    assert list(faults(values, VALUES[folder], folder)) == []


def test_the_check_of_names_finds_what_is_wrong():
    wrong = {"selector": {"matchlabels": {}}, "targetPorts": [{}]}
    assert sorted(faults(wrong, INFERENCE_POOL, "pool")) == [
        "pool.selector.matchLabels is missing",
        "pool.selector.matchlabels is unknown",
        "pool.targetPorts[0].number is missing",
    ]


@pytest.mark.parametrize("folder", ["vllm-router", "aibrix"])
def test_selectors_and_ports_meet(folder):
    deployment, service = resource(folder, "Deployment"), resource(folder, "Service")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_the_router_understands_its_arguments():
    pod = resource("vllm-router", "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    parsed = parse_router_args([arg.replace("$(NAMESPACE)", "here") for arg in container["args"]])
    assert parsed.policy == "consistent_hash"
    assert parsed.service_discovery
    assert parsed.selector == PODS
    assert parsed.service_discovery_namespace == "here"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": parsed.port, "metrics": parsed.prometheus_port}
    (rule,) = resource("vllm-router", "Role")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    assert (
        pod["serviceAccountName"] == resource("vllm-router", "ServiceAccount")["metadata"]["name"]
    )


def test_the_endpoint_picker_sticks_to_the_header():
    (values,) = load(ROUTERS / "llm-d" / "values.yaml")
    epp = values["router"]["epp"]
    config = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    assert list(faults(config, PICKER, "picker")) == []
    plugins = {plugin["type"]: plugin.get("parameters") for plugin in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    weights = {plugin["pluginRef"]: plugin["weight"] for plugin in profile["plugins"]}
    assert weights.keys() == plugins.keys()
    affinity = plugins["session-affinity-scorer"]
    assert list(faults(affinity, SESSION_AFFINITY, "affinity")) == []
    assert affinity["strategy"] == "session_id"
    assert affinity["sessionIdConfig"]["sources"] == [{"header": "x-session-id"}]
    # More than one load alone, less than both: affinity, but not at any price.
    loads = [weight for name, weight in weights.items() if name != "session-affinity-scorer"]
    assert max(loads) < weights["session-affinity-scorer"] < sum(loads)


def test_the_two_pools_are_one():
    (values,) = load(ROUTERS / "llm-d" / "values.yaml")
    pool = resource("llm-d", "InferencePool")["spec"]
    servers = values["router"]["modelServers"]
    assert pool["selector"]["matchLabels"] == servers["matchLabels"] == PODS
    assert pool["targetPorts"] == servers["targetPorts"]
    backend = resource("llm-d", "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]
    assert backend["name"] == resource("llm-d", "InferencePool")["metadata"]["name"]


def test_production_stack_loads_the_plugin_and_routes_by_the_header():
    (values,) = load(ROUTERS / "production-stack" / "values.yaml")
    assert values["routerSpec"] == {"routingLogic": "session", "sessionKey": "x-session-id"}
    (model,) = values["servingEngineSpec"]["modelSpec"]
    environment = {variable["name"]: variable["value"] for variable in model["env"]}
    assert environment.pop("VLLM_PLUGINS") == "lego"
    known = {variable_name(field.name) for field in dataclasses.fields(Settings)}
    assert environment.keys() <= known
    mounts = {mount["name"]: mount["mountPath"] for mount in model["extraVolumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in model["extraVolumes"]}
    assert set(environment.values()) == set(mounts.values())
    assert model["enableLoRA"] is True


def test_aibrix_finds_the_model_under_one_name():
    deployment, service = resource("aibrix", "Deployment"), resource("aibrix", "Service")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    name = labels["model.aibrix.ai/name"]
    (container,) = pod["spec"]["containers"]
    flags = dict(arg.removeprefix("--").split("=") for arg in container["args"] if "=" in arg)
    assert name == service["metadata"]["name"] == flags.pop("served-model-name")
    assert labels["model.aibrix.ai/port"] == flags.pop("port")
    assert labels["model.aibrix.ai/port"] == str(container["ports"][0]["containerPort"])
    assert int(flags.pop("shutdown-timeout")) < pod["spec"]["terminationGracePeriodSeconds"]
    known = {flag_name(field.name).removeprefix("--") for field in dataclasses.fields(Settings)}
    assert flags.keys() <= known
    config = json.loads(pod["metadata"]["annotations"]["model.aibrix.ai/config"])
    profile = config["profiles"][config["defaultProfile"]]
    assert profile == {"routingStrategy": "session-affinity"}


def test_the_document_names_every_file_and_the_key_as_clients_make_it():
    document = DOCUMENT.read_text()
    for path in ROUTERS.rglob("*.yaml"):
        assert f"routers/{path.relative_to(ROUTERS)}" in document
    (key,) = re.findall(r'^  -H "x-session-id: (\S+)"', document, re.MULTILINE)
    (adapters,) = re.findall(r'"adapters": (\[.*?\])', document)
    assert key == affinity_key(json.loads(adapters))
