"""Everything that touches vLLM's insides. Supports 0.26 and newer.

What each patch needs is in `compatibility.py`, and is looked for before anything is patched.

| patch | why | how | can go when |
| --- | --- | --- | --- |
| `lora_model_runner_mixin.LRUCacheWorkerLoRAManager` | vLLM loads an adapter from a path, on the engine's loop | a subclass whose `_load_adapter` takes finished tensors for a `lego://` path; everything else is vLLM's | LoRARequest can carry tensors |
| `LoRAModelManager.activate_adapter` (one instance) | for each pair of matrices of a layer it launches four small copies, some 900 for an 8B model, while all streams wait | for merges without a slot, what the layers write is noted and written at once; which layer takes what is decided by vLLM | vLLM copies in batches |
| `WorkerBase.lego_stage`, `.lego_discard`, `.lego_kept`, `.lego_forget` | a worker has no way to start work off the loop | four methods more, called through `collective_rpc` | vLLM has a registry of worker methods |
| `torch_ops.bgmv_shrink` and `.bgmv_expand`, on the CPU platform only | in a batch with LoRA requests they give requests of the base model the adapter of the last slot | what they add is zero for tokens without an adapter, as with the GPU kernels | vLLM pull request 48421 or its like is in the oldest version supported |
| `OpenAIServingModels.show_available_models` (one instance) | `/v1/models` would list every merge ever served, and nothing that vLLM does not serve itself | filters the first out of the list and adds the second | adapters can be served without being listed |
| `OpenAIServingModels.lora_requests` (one instance), with a policy file only | vLLM serves every adapter to everybody | a dictionary in which a caller finds what the policy lets it name | vLLM asks somebody who may use an adapter |
| `PrometheusStatLogger.gauge_lora_info` (one instance) | its labels list the adapters running at once, so that each combination of merges makes a series for ever | to it all merges are one, `lego` | it has bounded labels |
| `AsyncLLM.shutdown` (one instance) | it drains what the engine has; requests that wait here for a merge or a slot would be lost | waits for them first, within the time that `--shutdown-timeout` gives | endpoint plugins are told of a shutdown |
| `app.router.middleware_stack` (one instance) | `--middleware` runs before the API-key check | wrapped by our ASGI class, inside vLLM's own middleware | endpoint plugins can add middleware |
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from argparse import Namespace
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from lego_core import IncompatibleAdaptersError, LoraAdapter
from vllm_lego.access import Visible
from vllm_lego.compatibility import check_needs
from vllm_lego.errors import ShuttingDownError
from vllm_lego.identity import MERGE_ID, is_engine_id
from vllm_lego.packed import peft_tensors
from vllm_lego.recipe import SCHEME, Recipe
from vllm_lego.settings import Settings
from vllm_lego.slot_writes import SlotWrites
from vllm_lego.worker import StagingArea


def install_worker_patches() -> None:
    """Apply the patches that the workers need. Harmless in other processes and when repeated.

    Raises:
        UnsupportedVllmError: this vLLM cannot be patched; nothing was.
    """
    from vllm.platforms import current_platform

    cpu_alone = ["torch_ops.bgmv_shrink"] * current_platform.is_cpu()
    check_needs(
        "lora_model_runner_mixin.LRUCacheWorkerLoRAManager",
        "WorkerBase.lego_stage",
        "LoRAModelManager.activate_adapter",
        *cpu_alone,
    )
    from vllm.v1.worker import lora_model_runner_mixin, worker_base

    stock = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    if hasattr(stock, "lego_staging"):
        return

    class LegoWorkerLoRAManager(stock):  # type: ignore[misc, valid-type]
        """vLLM's manager, which also understands merge recipes."""

        lego_staging: StagingArea

        def create_lora_manager(self, *args: Any, **kwargs: Any) -> Any:
            model = super().create_lora_manager(*args, **kwargs)
            vllm_config = kwargs.get("vllm_config") or args[1]
            check = _member_check(self, vllm_config)
            _fill_slots_at_once(self._adapter_manager)
            parallel = vllm_config.parallel_config
            self.lego_staging = StagingArea(
                self.device,
                self.lora_config.lora_dtype,
                check,
                partial(_lora_model, self),
                Settings.from_environment(os.environ),
                rank=parallel.rank,
                workers=parallel.world_size,
            )
            return model

        def _load_adapter(self, lora_request: Any) -> Any:
            if not lora_request.lora_path.startswith(SCHEME):
                return super()._load_adapter(lora_request)
            return self.lego_staging.take(Recipe.decode(lora_request.lora_path))

    # Set on the class, so that a second call finds it.
    LegoWorkerLoRAManager.lego_staging = None  # type: ignore[assignment]
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = LegoWorkerLoRAManager

    _add_methods(worker_base.WorkerBase)
    if current_platform.is_cpu():
        _keep_the_base_model_apart()


def _add_methods(worker: Any) -> None:
    """Let the front end call a worker's staging area."""

    def lego_stage(self: Any, recipes: list[str], holder: str) -> dict[str, Any]:
        return _staging(self).stage(map(Recipe.decode, recipes), holder)

    def lego_kept(self: Any) -> list[tuple[str, int, float]]:
        kept = _staging(self).tiers.in_host_memory()
        return [(merge.recipe, merge.packed.nbytes, merge.fidelity) for merge in kept]

    def lego_forget(self: Any, merge_id: str) -> bool | None:
        return _staging(self).forget(merge_id)

    def lego_discard(self: Any, merge_id: str, engine_id: int, holder: str) -> bool:
        gone = _staging(self).discard(merge_id, holder)
        if gone:
            self.model_runner.lora_manager.remove_adapter(engine_id)
        return gone

    worker.lego_stage = lego_stage
    worker.lego_kept = lego_kept
    worker.lego_forget = lego_forget
    worker.lego_discard = lego_discard


def _keep_the_base_model_apart() -> None:
    """Let the CPU's LoRA kernels skip tokens without an adapter, whose slot index is -1.

    Zeros from the shrink add nothing in the expand; an embedding's LoRA has an expand alone.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    stock_shrink, stock_expand = lora_ops.bgmv_shrink, lora_ops.bgmv_expand

    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        stock_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0)[:, None], 0)

    def bgmv_expand(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        add_inputs: bool = True,  # noqa: FBT001, FBT002  vLLM's signature
    ) -> None:
        inputs = inputs.masked_fill((lora_indices_tensor < 0)[:, None], 0)
        stock_expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs)

    for module in lora_ops, punica_cpu:  # the prefill's sgmv_… look them up in the first
        module.bgmv_shrink, module.bgmv_expand = bgmv_shrink, bgmv_expand


def _staging(worker: Any) -> StagingArea:
    staging: StagingArea = worker.model_runner.lora_manager.lego_staging
    return staging


def _name_mapper(manager: Any) -> Any:
    """Return vLLM's map from the checkpoint's module names to its own, without stacking."""
    mapper = getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    # 0.32 has get_rename_mapper, 0.26 get_unstacked_mapper.
    rename = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
    return rename()


def _fill_slots_at_once(manager: Any) -> None:
    """Write a merge into its slot in a few launches: vLLM takes four for every matrix pair."""
    check_needs("LoRAModelManager", manager=manager)
    stock = manager.activate_adapter
    writes = SlotWrites(manager.modules.values(), ("lora_a_stacked", "lora_b_stacked"))

    def activate_adapter(lora_id: int) -> bool:
        # vLLM calls this for every adapter of every step; most are in a slot already.
        if not is_engine_id(lora_id) or lora_id in manager.lora_index_to_id:
            return bool(stock(lora_id))
        with record_function("lego.register"), writes.noted():
            return bool(stock(lora_id))

    manager.activate_adapter = activate_adapter


def _lora_model(manager: Any, adapter: LoraAdapter, lora_int_id: int) -> Any:
    """Wrap staged tensors for vLLM without copying them.

    vLLM's `add_adapter` repacks the result, which is therefore good for one of its calls, and
    scales lora_B in place unless the scaling is 1, which a merge's is. Threads may call this.
    """
    from vllm.lora.peft_helper import PEFTHelper

    targets = sorted({name.rpartition(".")[2] for name in adapter.modules})
    return manager._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_int_id,
        tensors=peft_tensors(adapter),
        peft_helper=PEFTHelper.from_dict(
            {"r": adapter.rank, "lora_alpha": adapter.rank, "target_modules": targets}
        ),
        device=str(manager.device),
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=_name_mapper(manager),
        skip_prefixes=getattr(manager._adapter_manager.model, "lora_skip_prefixes", None),
    )


def _slot_shapes(layer: Any, parts: list[str]) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of a layer's parts as its slots have them, 0 for unknown."""
    a_slots: Any = getattr(layer, "lora_a_stacked", ())
    b_slots: Any = getattr(layer, "lora_b_stacked", ())
    if isinstance(a_slots, torch.Tensor):  # an embedding's: [slots, vocabulary, rank]
        return {parts[0]: (a_slots.shape[1], b_slots.shape[-2])}
    if len(a_slots) != len(parts) or len(b_slots) != len(parts):
        return dict.fromkeys(parts, (0, 0))  # shapes of its own: left to vLLM
    return {
        part: (a_slot.shape[-1], b_slot.shape[-2])
        for part, a_slot, b_slot in zip(parts, a_slots, b_slots, strict=True)
    }


def _member_check(manager: Any, vllm_config: Any) -> Callable[[LoraAdapter], None]:
    """Return a function that refuses an adapter which the served model cannot take.

    vLLM drops modules that it does not know in silence, and finds wrong shapes only while it
    copies into a slot, which it then leaves half filled.
    """
    slots: dict[str, tuple[int, int]] = {}
    inner = manager._adapter_manager
    for name, layer in inner.modules.items():
        slots |= _slot_shapes(layer, inner.packed_modules.get(name, [name]))
    parallel = vllm_config.parallel_config
    shards = parallel.tensor_parallel_size
    share = f" on each of {shards} workers" if shards > 1 else ""
    # Only a worker that holds the whole model, all of it open to LoRA, knows every module.
    whole = (
        parallel.pipeline_parallel_size == 1
        and getattr(manager.lora_config, "target_modules", None) is None
        and not getattr(inner, "is_pooling_model", False)
    )
    mapper = _name_mapper(manager)

    def fits(size: int, slot: int) -> bool:
        return slot == 0 or (size % slot == 0 and size // slot <= shards)

    def check(adapter: LoraAdapter) -> None:
        for name, module in adapter.modules.items():
            local = mapper._map_name(name) if mapper else name
            if local not in slots:
                if whole:
                    raise IncompatibleAdaptersError(
                        f"adapter {adapter.name!r}, module {name!r}: the base model has no such "
                        "layer that takes LoRA"
                    )
                continue
            width, height = slots[local]
            if not fits(module.in_features, width) or not fits(module.out_features, height):
                raise IncompatibleAdaptersError(
                    f"adapter {adapter.name!r}, module {name!r}: it updates a layer of "
                    f"{module.in_features} inputs and {module.out_features} outputs, the base "
                    f"model's has {width} and {height}{share}; it was trained on another base model"
                )

    return check


class _NativeAdapters(Mapping[str, str]):
    """The folder by name of every adapter that vLLM itself serves: a view, merges left out."""

    def __init__(self, models: Any) -> None:
        self._models = models

    @property
    def _lora_requests(self) -> Mapping[str, Any]:
        requests: Mapping[str, Any] = self._models.lora_requests
        return requests

    def __getitem__(self, name: str) -> str:
        path = self._lora_requests[name].lora_path
        if path.startswith(SCHEME):
            raise KeyError(name)
        return _absolute(path)

    def __contains__(self, name: object) -> bool:
        request = self._lora_requests.get(name)  # type: ignore[call-overload]
        return request is not None and not request.lora_path.startswith(SCHEME)

    def __iter__(self) -> Iterator[str]:
        return (
            name
            for name, request in self._lora_requests.items()
            if not request.lora_path.startswith(SCHEME)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


@lru_cache(4096)  # as often asked for as there are requests
def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


class Engine:
    """What the service needs of one vLLM server, seen from its API server.

    Args:
        client: vLLM's `EngineClient`.
        state: the FastAPI application's state.

    Raises:
        UnsupportedVllmError: they lack what the plugin needs.
    """

    def __init__(self, client: Any, state: Any) -> None:
        self._client = client
        self._models = state.openai_serving_models
        check_needs("EngineClient", client=client)
        check_needs(
            "OpenAIServingModels.show_available_models",
            "OpenAIServingModels.lora_requests",
            models=self._models,
        )
        self._responses = getattr(state, "openai_serving_responses", None)
        self._holder = uuid.uuid4().hex
        lora_config = state.vllm_config.lora_config
        parallel = state.vllm_config.parallel_config
        self.api_servers: int = getattr(parallel, "_api_process_count", 1)
        self.workers_per_engine: int = parallel.world_size
        self.slots: int = lora_config.max_loras
        self.max_rank: int = lora_config.max_lora_rank
        self.dtype: str = str(lora_config.lora_dtype).removeprefix("torch.")
        self.base_model: str = self._models.base_model_paths[0].name
        self.adapters: Mapping[str, str] = _NativeAdapters(self._models)
        self._list_models()
        _bound_the_labels(client)

    def is_base_model(self, name: str) -> bool:
        """Whether `name` is one of the names of the base model."""
        return bool(self._models.is_base_model(name))

    def is_served(self, name: str) -> bool:
        """Whether vLLM answers to this model name now."""
        return self.is_base_model(name) or name in self._models.lora_requests

    def hide(self, may_see: Callable[[str | Recipe], bool]) -> None:
        """Let callers find those adapters and merges alone that they may name."""

        def is_visible(request: Any) -> bool:
            if request.lora_path.startswith(SCHEME):
                return may_see(Recipe.decode(request.lora_path))
            return may_see(request.lora_name)

        self._models.lora_requests = Visible(self._models.lora_requests, is_visible)

    def list_too(self, names: Callable[[], Awaitable[Iterable[str]]]) -> None:
        """Add adapters that vLLM does not serve itself to its list of models."""
        self._listed_too = names

    def _list_models(self) -> None:
        stock = self._models.show_available_models

        async def show_available_models() -> Any:
            listed = await stock()
            listed.data = [card for card in listed.data if not str(card.root).startswith(SCHEME)]
            base = listed.data[0]
            listed.data += [
                type(base)(
                    id=name, root=name, parent=base.id, permission=[type(base.permission[0])()]
                )
                for name in await self._listed_too()
            ]
            return listed

        self._models.show_available_models = show_available_models

    def in_flight(self) -> set[str]:
        """Return the names of all adapters and merges that vLLM has requests of now.

        A client that leaves ends its HTTP request before its request leaves the engine.
        """
        states = self._client.output_processor.request_states.values()
        return {state.lora_name for state in states if state.lora_name is not None}

    async def stage(self, recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
        """Start or poll merges on every worker; see `StagingArea.stage`."""
        return await self._rpc("lego_stage", [recipe.encode() for recipe in recipes], self._holder)

    async def kept(self) -> list[tuple[Recipe, int, float]]:
        """Return the merges in the first worker's host memory, with bytes and fidelity."""
        first, *_ = await self._rpc("lego_kept")
        return await asyncio.to_thread(
            lambda: [
                (Recipe.decode(recipe), nbytes, fidelity) for recipe, nbytes, fidelity in first
            ]
        )

    async def discard(self, merge_id: str, engine_id: int) -> None:
        """Let go of a merge on every worker, and free its slot if nobody holds it."""
        await self._rpc("lego_discard", merge_id, engine_id, self._holder)

    async def forget(self, merge_id: str) -> bool | None:
        """Drop a merge from every worker's host memory; see `StagingArea.forget`."""
        held = await self._rpc("lego_forget", merge_id)
        return None if None in held else any(held)

    def background_task(self, response_id: str) -> asyncio.Task[None] | None:
        """Return the task of a response that goes on after its HTTP request, if it is under way."""
        tasks: dict[str, asyncio.Task[None]] = getattr(self._responses, "background_tasks", {})
        return tasks.get(response_id)

    async def register(self, recipe: Recipe, engine_id: int) -> None:
        """Copy a staged merge into a slot of every worker and serve it under its id."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(
            lora_name=recipe.merge_id, lora_int_id=engine_id, lora_path=recipe.encode()
        )
        with _shutdown_told():
            await self._client.add_lora(request)
        self._models.lora_requests[recipe.merge_id] = request

    def before_shutdown(self, drain: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have vLLM wait for `drain`, on this event loop, before it stops its engine.

        Called where vLLM's launcher calls its client: in a thread, the loop still running.
        """
        check_needs("AsyncLLM.shutdown", client=self._client)
        loop = asyncio.get_running_loop()
        stock = self._client.shutdown

        def shutdown(timeout: float | None = None) -> None:
            self._client.shutdown = stock
            end = time.monotonic() + (timeout or 0)
            if timeout:  # 0 means not to wait for anybody, None that there is no loop any more
                with suppress(TimeoutError):
                    asyncio.run_coroutine_threadsafe(drain(), loop).result(timeout)
                timeout = max(1.0, end - time.monotonic())  # vLLM kills at once for 0
            stock(timeout=timeout)

        self._client.shutdown = shutdown

    def unpublish(self, merge_id: str) -> None:
        """Stop answering to a merge's id."""
        self._models.lora_requests.pop(merge_id, None)

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker of every engine.

        With data parallelism vLLM's `collective_rpc` also asks all engines, but returns what the
        first of them answers.
        """
        core = self._client.engine_core
        engines = getattr(core, "core_engines", ())
        with _shutdown_told():
            if len(engines) < 2:
                return list(await self._client.collective_rpc(method, args=args))
            call = partial(core._call_utility_async, "collective_rpc", method, None, args, None)
            answers = await asyncio.gather(*(call(engine=engine) for engine in engines))
        return [worker for engine in answers for worker in engine]


@contextmanager
def _shutdown_told() -> Iterator[None]:
    """Tell an engine that drains, and takes no calls any more, from one that failed."""
    try:
        yield
    except Exception as error:
        if "Server shutting down" not in str(error):  # vLLM raises a plain Exception
            raise
        raise ShuttingDownError from error


class _MergesAsOne:
    """vLLM's gauge of the adapters that run or wait, for which all merges have one name."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge

    def labels(self, **labels: Any) -> Any:
        return self._gauge.labels(
            **{
                label: ",".join({MERGE_ID.sub("lego", name): None for name in value.split(",")})
                if isinstance(value, str)
                else value
                for label, value in labels.items()
            }
        )


def _bound_the_labels(client: Any) -> None:
    manager = getattr(client, "logger_manager", None)  # None with --disable-log-stats
    for stat_logger in getattr(manager, "stat_loggers", ()):
        gauge = getattr(stat_logger, "gauge_lora_info", None)
        if gauge is not None:
            stat_logger.gauge_lora_info = _MergesAsOne(gauge)


def has_lora(state: Any) -> bool:
    """Whether the server was started with `--enable-lora`."""
    return state.vllm_config.lora_config is not None


def makes_spans(state: Any) -> bool:
    """Whether the server was started with `--otlp-traces-endpoint`."""
    return state.vllm_config.observability_config.otlp_traces_endpoint is not None


def api_keys(args: Namespace) -> list[str]:
    """Return the keys that vLLM accepts; none means that it asks for none."""
    from vllm import envs

    keys: Iterable[str | None] = args.api_key or [envs.VLLM_API_KEY]
    return [key for key in keys if key]


def wrap_router(app: Any, wrap: Callable[[Any], Any]) -> None:
    """Put an ASGI application around the routes, inside all of vLLM's middleware.

    Raises:
        UnsupportedVllmError: the application has no such place.
    """
    check_needs("app.router.middleware_stack", app=app)
    app.router.middleware_stack = wrap(app.router.middleware_stack)
