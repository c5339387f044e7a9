"""vLLM, played by a few lines: for tests of the orchestrator and the staging area.

Only vLLM is played: its client, its workers' adapter manager and its table of names. Everything
of ours is the real thing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from lego_core import LoraAdapter
from vllm_lego._vllm import install_worker_patches
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.recipe import Recipe
from vllm_lego.service import LegoService, Serving
from vllm_lego.settings import Settings
from vllm_lego.worker import StagingArea

NAMES = "abcdef"
_Served = TypeVar("_Served")


class PlayedVllm:
    """What of vLLM the plugin meets: one worker, its registered adapters, and the names served."""

    def __init__(
        self,
        folder: Path,
        check: Callable[[LoraAdapter], None],
        settings: Settings,
        **parallel: int,
    ) -> None:
        install_worker_patches()  # of which `collective_rpc` calls one
        self.registered: dict[int, str] = {}
        self.staging = StagingArea(
            torch.device("cpu"), torch.float32, check, lambda adapter, _: adapter, settings
        )
        manager = SimpleNamespace(
            lego_staging=self.staging, remove_adapter=lambda i: self.registered.pop(i, None)
        )
        self.worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
        self.names = {
            name: SimpleNamespace(lora_path=str(folder / name), lora_name=name) for name in NAMES
        }
        models = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name="base")],
            lora_requests=self.names,
            is_base_model=lambda name: name == "base",
            show_available_models=None,
        )
        self.state = SimpleNamespace(
            openai_serving_models=models,
            vllm_config=SimpleNamespace(
                lora_config=SimpleNamespace(max_lora_rank=8, max_loras=4, lora_dtype=torch.float32),
                parallel_config=SimpleNamespace(**{"world_size": 1} | parallel),
            ),
        )
        self.output_processor = SimpleNamespace(request_states={})
        self.engine_core = SimpleNamespace()
        self.broken = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        from vllm.v1.worker.worker_base import WorkerBase  # noqa: PLC0415  slow, for all tests here

        await asyncio.sleep(0)
        return [getattr(WorkerBase, method)(self.worker, *args)]

    async def add_lora(self, request: Any) -> bool:
        await asyncio.sleep(0)
        if self.broken:
            raise RuntimeError("no free slots")
        self.staging.take(Recipe.decode(request.lora_path))
        self.registered[request.lora_int_id] = request.lora_name
        return True

    def merges(self) -> set[str]:
        return {name for name, r in self.names.items() if r.lora_path.startswith("lego://")}


@asynccontextmanager
async def holding(
    serve: Callable[..., Awaitable[_Served]], *args: Any, **fields: Any
) -> AsyncIterator[_Served]:
    """Have a service serve something, and hold it while the context is open."""
    with ExitStack() as held:
        yield await serve(*args, held, **fields)


async def use(service: LegoService, names: Any, **weights: float) -> Serving:
    wanted = AdapterSet({name: weights.get(name, 1.0) for name in sorted(names)})
    with ExitStack() as held:
        return await service.serve(wanted, held, param="adapters")


def nothing_left(service: LegoService, vllm: PlayedVllm) -> bool:
    """Whether cache, workers and vLLM agree, and nobody holds a pin or waits."""
    cached = service.merged.cache.snapshot()
    registered = {identity for identity, merge in cached.items() if merge.is_registered}
    return (
        set(cached) == set(vllm.staging._merges)
        and registered == vllm.merges() == set(vllm.registered.values())
        and not service.merged._merging
        and not service.merged._registering
        and not service.merged.cache._pins
    )


def room_for_one(start: Any) -> int:
    """Bytes of one merge of two."""

    async def measured():
        service, _ = start()
        await use(service, "ab")
        (one,) = service.merged.cache.snapshot().values()
        return one.nbytes

    return asyncio.run(measured())
