"""The two servers that are compared: vLLM with the plugin, and stock vLLM.

Both run at once, on one device or one each, and are asked in turn: whatever changes there meets both.
The one that is not asked computes nothing.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from vllm_lego.demo.server import ServerProcess, server_environment, serving_dtype

MODEL = "base"


@dataclass(frozen=True, slots=True)
class Peers:
    """The servers, ready."""

    lego: ServerProcess
    stock: ServerProcess


@contextmanager
def running(
    model: Path,
    natives: Mapping[str, Path],
    adapters: Mapping[str, Path],
    settings: Mapping[str, str],
    arguments: Sequence[str],
    gpus: Sequence[str] | None,
) -> Iterator[Peers]:
    """Start both, and stop them in the end.

    Args:
        model: both serve it.
        natives: adapters that stock vLLM loads at its start.
        adapters: what the plugin may merge, all of it in one folder; it loads none at its start.
        settings: the plugin's, `VLLM_LEGO_…`.
        arguments: of both.
        gpus: one for each, the plugin's first; None to share what there is.
    """
    both = [
        str(model),
        f"--served-model-name={MODEL}",
        f"--dtype={serving_dtype()}",
        "--max-model-len=8192",
        "--enable-lora",
        *_of_the_device(shared=gpus is None),
        *arguments,
    ]
    named = ["--lora-modules", *(f"{name}={path}" for name, path in natives.items())]
    (folder,) = {path.parent for path in adapters.values()}
    for_lego, for_stock = [_on(gpu) for gpu in gpus] if gpus else ({}, {})
    lego = ServerProcess(
        both,
        server_environment("lego")
        | {"VLLM_LEGO_ADAPTER_DIR": str(folder)}
        | dict(settings)
        | for_lego,
        progress=partial(print, "the plugin's server:", flush=True),
    )
    stock = ServerProcess(
        [*both, *named],
        server_environment("") | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | for_stock,
        progress=partial(print, "the stock server:", flush=True),
    )
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        for started in [pool.submit(stack.enter_context, server) for server in (lego, stock)]:
            started.result()
        yield Peers(lego, stock)


def _on(gpu: str) -> dict[str, str]:
    """Name a GPU as nvidia-smi does."""
    return {"CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def device_bytes(gpu: str = "0") -> int | None:
    """Return the memory in use on a GPU, by everybody; None where there is none."""
    if not torch.cuda.is_available():
        return None
    command = shlex.split(f"nvidia-smi --id={gpu} --query-gpu=memory.used")
    command += ["--format=csv,noheader,nounits"]
    used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(used.split()[0]) << 20


def resident_bytes(server: ServerProcess) -> int:
    """Return the memory of a server's processes, what they share counted once for each."""
    processes = psutil.Process(server.session)
    return sum(p.memory_info().rss for p in [processes, *processes.children(recursive=True)])


def _of_the_device(*, shared: bool) -> list[str]:
    if not torch.cuda.is_available():
        return ["--enforce-eager", "--lora-dtype=bfloat16"]  # budgets go by the files' sizes
    if not shared:
        return []
    # Given, not measured: each would take the other's memory for its own.
    return ["--gpu-memory-utilization=0.3", f"--kv-cache-memory-bytes={12 << 30}"]
