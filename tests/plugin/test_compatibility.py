"""A vLLM that the plugin cannot patch is refused in one sentence. Here, the real one taken apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm

from vllm_lego import _vllm
from vllm_lego.compatibility import (
    NEEDS,
    UnsupportedVllmError,
    check_needs,
    check_version,
    installed_vllm,
)

VLLM = Path(vllm.__file__).parent
REGISTER = "from vllm_lego.plugin import register; register(); print('registered')"


def altered(folder: Path, file: str, text: str) -> Path:
    """Make a copy of vLLM, of links, in which one file has another text. Returns what to import."""
    target, source = folder / "vllm", VLLM
    for part in Path(file).parts:
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name not in (part, "__pycache__"):
                (target / entry.name).symlink_to(entry)
        target, source = target / part, source / part
    target.write_text(text)
    return folder


def run(*arguments: str, path: Path | None = None, **environment: str):
    paths = [str(path)] * (path is not None) + [os.environ.get("PYTHONPATH", "")]
    variables = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=variables | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )


def sentence(ran: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence that is left when vLLM's own log is taken away."""
    assert ran.returncode == 1
    said = [line for line in ran.stderr.splitlines() if line.startswith("vllm-lego")]
    assert len(said) == 1
    assert "Traceback" not in ran.stdout + ran.stderr
    return said[0]


def test_an_unsupported_version_does_not_serve(tmp_path):
    path = altered(tmp_path, "_version.py", "__version__ = '0.25.1'\n__version_tuple__ = (0, 25)\n")
    ran = run("-m", "vllm.entrypoints.cli.main", "serve", "m", path=path, VLLM_PLUGINS="lego")
    assert sentence(ran).endswith(
        "vLLM 0.25.1 is not supported; vllm-lego 0.1.0 supports vLLM 0.26 and newer"
    )


def test_a_patch_whose_target_is_gone_does_not_serve(tmp_path):
    file = "v1/worker/lora_model_runner_mixin.py"
    text = (VLLM / file).read_text().replace("LRUCacheWorkerLoRAManager", "WorkerLoRAManager")
    ran = run("-c", REGISTER, path=altered(tmp_path, file, text), VLLM_PLUGINS="lego")
    said = sentence(ran)
    assert f"vLLM {vllm.__version__} cannot be patched, it lacks vllm.v1.worker.lora" in said
    assert said.count("LRUCacheWorkerLoRAManager.") == 3


def test_a_wrong_setting_does_not_serve():
    ran = run("-c", REGISTER, VLLM_PLUGINS="other,lego", VLLM_LEGO_RANK="many")
    assert "VLLM_LEGO_RANK is 'many'" in sentence(ran)


def test_a_plugin_nobody_named_steps_aside():
    ran = run("-c", REGISTER, VLLM_LEGO_RANK="many")
    assert (ran.returncode, ran.stdout.split()[-1]) == (0, "registered")
    assert "vllm-lego does nothing here: VLLM_LEGO_RANK is 'many'" in ran.stderr


@pytest.mark.parametrize(
    "version", ["0.26", "0.26.0rc1", "0.32.0+cpu", "1.0", "dev", "0.1.dev7+g1"]
)
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.6.3.post1", "0.25.2rc1.dev5+g0"])
def test_unsupported_versions(version):
    with pytest.raises(UnsupportedVllmError, match=re.escape(f"vLLM {version} is not")):
        check_version(version)


def test_the_version_is_known_without_importing_vllm():
    script = (
        "import sys; from vllm_lego.compatibility import installed_vllm; print(installed_vllm());"
        "print('vllm' in sys.modules)"
    )
    assert run("-c", script).stdout.split() == [installed_vllm(), "False"]
    assert str(installed_vllm()).partition("+")[0] == vllm.__version__.partition("+")[0]


def test_each_patch_says_what_it_needs():
    manifest = re.findall(r"^\| `(\S+?)`", str(_vllm.__doc__), re.MULTILINE)
    assert set(manifest) == set(NEEDS) - {
        "EngineClient",
        "LoRAModelManager",
    }  # objects, not patches


def test_what_an_object_lacks_is_named():
    with pytest.raises(UnsupportedVllmError, match=r"lacks app:router\.middleware_stack;"):
        check_needs("app.router.middleware_stack", app=SimpleNamespace(router=None))
