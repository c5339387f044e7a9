"""deploy/README.md followed literally: its commands run in a shell, in a folder like the reader's.

helm, tar and the shell are real. There is no cluster: what docker, kubectl and curl were asked for is
noted, and must fit together and fit what the chart makes of the values.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.sizing import main as sizing
from tests.deploy.tools import ROOT, tool
from vllm_lego.demo.server import shipped_adapters

README = (ROOT / "deploy/README.md").read_text()
CHART = "deploy/helm/vllm-lego"
DOCUMENTS = [ROOT / "deploy/README.md", ROOT / "deploy/SIZING.md"]

STAND_IN = """#!{python}
import json, os, subprocess, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
given = sys.stdin.buffer.read() if "-" in arguments or "exec" in arguments else b""
with open(os.environ["NOTES"], "a") as notes:
    text = "" if "exec" in arguments else given.decode()
    notes.write(json.dumps([name, arguments, text]) + "\\n")
command = []
if name == "helm":
    command = [os.environ["HELM"], "template", *arguments[1:]]
if name == "kubectl" and arguments[0] == "exec":
    inside = arguments[arguments.index("--") + 1 :]
    command = [a.replace("/adapters", os.environ["VOLUME"]) for a in inside]
if command:
    sys.exit(subprocess.run(command, input=given).returncode)
"""


class Followed:
    """What the commands of the first block asked for."""

    def __init__(self, folder: Path, helm: str) -> None:
        programs, self.volume, notes = folder / "bin", folder / "volume", folder / "notes"
        programs.mkdir()
        self.volume.mkdir()
        for name in "docker", "kubectl", "helm", "curl":
            (programs / name).write_text(STAND_IN.format(python=sys.executable))
            (programs / name).chmod(0o755)
        checkout = folder / "checkout"
        checkout.mkdir()
        (checkout / "deploy").symlink_to(ROOT / "deploy")
        for name, shipped in zip(("sql", "style"), shipped_adapters().values(), strict=False):
            shutil.copytree(shipped, checkout / "adapters" / name)
        git = ["git", "-C", str(checkout), "-c", "user.name=reader", "-c", "user.email=reader@host"]
        for arguments in ["init"], ["commit", "--allow-empty", "--message=checkout"]:
            subprocess.run([*git, *arguments], check=True, capture_output=True)
        self.block = re.search(r"```bash\n(export IMAGE.*?)```", README, re.DOTALL)[1]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.block + "\nwait"],
            cwd=checkout,
            env=os.environ
            | {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes), "HELM": tool(helm)}
            | {"VOLUME": str(self.volume)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.rendered = list(filter(None, yaml.safe_load_all(done.stdout)))
        self.calls: list[tuple[str, list[str], str]] = [
            json.loads(line) for line in notes.read_text().splitlines()
        ]

    def call(self, *words: str) -> tuple[list[str], str]:
        """Return arguments and standard input of the one call that begins so."""
        name, *first = words
        [found] = [
            (arguments, given)
            for program, arguments, given in self.calls
            if program == name and arguments[: len(first)] == first
        ]
        return found

    def manifest(self, kind: str) -> dict[str, Any]:
        [found] = [m for m in self.rendered if m["kind"] == kind]
        return found

    @property
    def pod(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.manifest("Deployment")["spec"]["template"]["spec"]
        return spec


@pytest.fixture(scope="module", params=["helm3", "helm4"])
def followed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    return Followed(tmp_path_factory.mktemp("reader"), request.param)


def test_there_are_ten_commands(followed: Followed):
    numbers = re.findall(r"^# ([\d, ]+):", followed.block, re.MULTILINE)
    assert [int(n) for line in numbers for n in line.split(",")] == list(range(1, 11))
    order = [(program, arguments[0]) for program, arguments, _ in followed.calls]
    assert order[:3] == [("docker", "build"), ("docker", "push"), ("kubectl", "create")]


def test_the_image_that_is_built_is_the_one_that_runs(followed: Followed):
    build, _ = followed.call("docker", "build")
    tag = build[build.index("-t") + 1]
    assert followed.call("docker", "push")[0][1] == tag
    [container] = followed.pod["containers"]
    assert container["image"] == tag
    dockerfile = (ROOT / build[build.index("-f") + 1]).read_text()
    built_with = [build[i + 1] for i, word in enumerate(build) if word == "--build-arg"]
    for name, _, value in (argument.partition("=") for argument in built_with):
        assert re.search(rf"^ARG {name}=", dockerfile, re.MULTILINE)
        assert value


def test_what_is_applied_is_valid_and_the_pod_may_fill_the_volume(followed: Followed):
    _, given = followed.call("kubectl", "apply")
    claim, pod = yaml.safe_load_all(given)
    for manifest in claim, pod:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    [volume] = pod["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # What it writes the server can read: the same account.
    for account in "runAsUser", "fsGroup":
        assert pod["spec"]["securityContext"][account] == followed.pod["securityContext"][account]
    assert followed.call("kubectl", "wait")[0][2] == f"pod/{pod['metadata']['name']}"


def test_the_adapters_arrive_where_the_server_looks_and_are_those_asked_for(followed: Followed):
    arrived = {path.parent.name for path in followed.volume.glob("*/adapter_config.json")}
    request, _ = followed.call("curl")
    assert arrived == {*json.loads(request[request.index("-d") + 1])["adapters"]}
    [container] = followed.pod["containers"]
    settings = {variable["name"]: variable.get("value") for variable in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    [volume] = [
        volume["name"]
        for volume in followed.pod["volumes"]
        if volume.get("persistentVolumeClaim") == {"claimName": "adapters"}
    ]
    assert mounts[volume] == settings["VLLM_LEGO_ADAPTER_DIR"]


def test_the_volume_is_made_where_the_server_can_run(followed: Followed):
    _, applied = followed.call("kubectl", "apply")
    [filler] = [m["spec"] for m in yaml.safe_load_all(applied) if m["kind"] == "Pod"]
    server, gpu = followed.pod, "nvidia.com/gpu"
    assert filler["nodeSelector"] == server.get("nodeSelector", {})
    assert followed.block.count("nodeSelector: $NODES") == 2
    assert filler["tolerations"] == server["tolerations"] == [{"key": gpu, "operator": "Exists"}]
    for pod in filler, server:
        assert gpu in pod["containers"][0]["resources"]["limits"]


def test_the_context_fits_the_gpu_that_the_document_asks_for(
    followed: Followed, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    _, values = followed.call("helm", "install")
    shape = re.search(r"```json\n(.*?)```", (ROOT / "deploy/SIZING.md").read_text(), re.DOTALL)[1]
    (tmp_path / "config.json").write_text(shape)
    [memory] = re.findall(r"a GPU that shows (\d+) GiB or more", README)
    assert sizing([f"--config={tmp_path}/config.json", f"--gpu-memory={memory}GiB"]) == 0
    tokens = re.search(r"KV cache +some ([\d,]+) tokens", capsys.readouterr().out)[1]
    assert yaml.safe_load(values)["vllmConfig"]["maxModelLen"] <= int(tokens.replace(",", ""))


def test_every_secret_and_claim_that_the_server_wants_was_made(followed: Followed):
    made = {
        (arguments[3], word.removeprefix("--from-literal=").partition("=")[0])
        for program, arguments, _ in followed.calls
        if program == "kubectl" and arguments[:2] == ["create", "secret"]
        for word in arguments[4:]
    }
    [container] = followed.pod["containers"]
    wanted = {
        (reference["name"], reference["key"])
        for variable in container["env"]
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    assert wanted == made
    _, applied = followed.call("kubectl", "apply")
    claims = {
        manifest["metadata"]["name"]
        for manifest in [*yaml.safe_load_all(applied), *followed.rendered]
        if manifest["kind"] == "PersistentVolumeClaim"
    }
    named = {v["persistentVolumeClaim"]["claimName"] for v in followed.pod["volumes"] if len(v) > 1
             and "persistentVolumeClaim" in v}  # fmt: skip
    assert named == claims


def test_the_request_reaches_the_service(followed: Followed):
    [_, service, ports], _ = followed.call("kubectl", "port-forward")
    local, _, remote = ports.partition(":")
    found = followed.manifest("Service")
    assert service == f"service/{found['metadata']['name']}"
    assert int(remote) in {port["port"] for port in found["spec"]["ports"]}
    request, _ = followed.call("curl")
    assert f"localhost:{local}/v1/chat/completions" in request
    secret, _ = followed.call("kubectl", "create", "secret", "generic", "clients")
    key = secret[-1].partition("api-key=")[2]
    assert len(key) == 48
    assert f"authorization: Bearer {key}" in request


def test_the_upgrades_render(followed: Followed, tmp_path: Path):
    install, values = followed.call("helm", "install")
    assert install[1:3] == ["vllm-lego", CHART]
    (tmp_path / "installed.yaml").write_text(values)
    joined = re.sub(r"\\\n\s*", "", README)
    commands = re.findall(r"helm upgrade (vllm-lego [^`\n]*)", joined)
    assert len(commands) == 2
    for command in commands:
        arguments = [word for word in shlex.split(command) if word != "--reset-then-reuse-values"]
        subprocess.run(
            [tool("helm4"), "template", *arguments, f"--values={tmp_path}/installed.yaml"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_value_that_is_named_exists(document: Path):
    values = yaml.safe_load((ROOT / CHART / "values.yaml").read_text())
    text = document.read_text()
    dotted = re.findall(r"`([a-z]\w*(?:\.\w+)+)\b", text)
    named = [name.split(".") for name in dotted if name.split(".")[0] in values]
    for mapping in re.findall(r"`(\w+: \{[^`]*\})`", text):
        [(first, rest)] = yaml.safe_load(mapping).items()
        named += [[first, key] for key in rest]
    assert named
    for name in named:
        place = values
        for key in name:
            assert key in place, f"{document.name} names {'.'.join(name)}"
            place = place[key]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    for link in links:
        assert link.startswith("https://") or (document.parent / link).exists(), link
