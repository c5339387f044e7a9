"""The orchestrator and the staging area against a vLLM that is played by a few lines.

Only vLLM is played: its client, its workers' adapter manager and its table of names. Everything
of ours is the real thing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.v1.worker.worker_base import WorkerBase

from lego_core import LoraAdapter, LoraModule, save_adapter
from tests.plugin.test_interception import echo
from vllm_lego._vllm import Engine, install_worker_patches
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import (
    BusyError,
    MergeFailedError,
    MergeTimeoutError,
    ServingError,
    ShuttingDownError,
    UnknownAdapterError,
    UnmergeableError,
    WorkersDisagreeError,
)
from vllm_lego.identity import engine_id
from vllm_lego.interception import Interception
from vllm_lego.metrics import Metrics
from vllm_lego.recipe import Recipe
from vllm_lego.service import LegoService, Serving
from vllm_lego.settings import Settings
from vllm_lego.sources import SHARED_S
from vllm_lego.worker import StagingArea

NAMES = "abcdef"


class PlayedVllm:
    """What of vLLM the plugin meets: one worker, its registered adapters, and the names served."""

    def __init__(
        self,
        folder: Path,
        check: Callable[[LoraAdapter], None],
        settings: Settings,
        **parallel: int,
    ) -> None:
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


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    install_worker_patches()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draws = torch.Generator().manual_seed(0)
    for name in NAMES:
        modules = {
            f"layer.{i}": LoraModule(
                torch.randn(2, 6, generator=draws), torch.randn(4, 2, generator=draws)
            )
            for i in range(3)
        }
        save_adapter(LoraAdapter(name, modules), tmp_path / name)
    return tmp_path


@pytest.fixture
def start(folder: Path):
    """Start a service; what Prometheus was told of is forgotten afterwards."""
    metrics = Metrics()

    def started(
        check: Callable[[LoraAdapter], None] = lambda adapter: None, **settings: Any
    ) -> tuple[LegoService, PlayedVllm]:
        vllm = PlayedVllm(folder, check, Settings(**settings))
        return LegoService(Engine(vllm, vllm.state), Settings(**settings), metrics), vllm

    yield started
    for collector in vars(metrics).values():
        REGISTRY.unregister(collector)


async def use(service: LegoService, names: Any, **weights: float) -> Serving:
    wanted = AdapterSet({name: weights.get(name, 1.0) for name in sorted(names)})
    async with service.serving(wanted, param="adapters") as serving:
        return serving


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


def test_miss_then_hit_and_any_order(start):
    async def scenario():
        service, vllm = start()
        first, second = await use(service, "ab"), await use(service, "ba")
        assert (first.result, second.result) == ("miss", "hit")
        assert first.model == second.model
        assert vllm.registered == {engine_id(first.model): first.model}
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_shutting_down_waits_for_what_was_taken_and_refuses_what_comes(start):
    """Those in line too: vLLM's scheduler does not know of them."""

    async def scenario():
        service, vllm = start()
        stopped = threading.Event()
        vllm.shutdown = lambda timeout: stopped.set()
        service._engine.before_shutdown(service.drain)
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            for names in ("ab", "ac", "ad", "ae"):  # as many as there are slots
                wanted = AdapterSet(dict.fromkeys(names, 1.0))
                await stack.enter_async_context(service.serving(wanted, param="adapters"))
            in_line = asyncio.create_task(use(service, "af"))
            while not service.slots.waiting():
                await asyncio.sleep(0.01)
            stopping = loop.run_in_executor(None, lambda: vllm.shutdown(timeout=60))
            while not service._closing:
                await asyncio.sleep(0.01)
            with pytest.raises(ShuttingDownError):
                await use(service, "bc")
            assert not stopped.is_set()
        assert (await in_line).result == "miss"
        await stopping
        assert stopped.is_set()

    asyncio.run(scenario())


def test_shutting_down_waits_no_longer_than_it_may(start):
    async def scenario():
        service, vllm = start()
        left: list[float] = []

        def shutdown(timeout: float) -> None:
            left.append(timeout)

        vllm.shutdown = shutdown
        service._engine.before_shutdown(service.drain)
        wanted = AdapterSet(dict.fromkeys("ab", 1.0))
        async with service.serving(wanted, param="adapters"):
            await asyncio.to_thread(lambda: vllm.shutdown(timeout=0.1))
            assert left == [1]  # vLLM kills at once for 0

    asyncio.run(scenario())


def test_a_cancelled_server_asks_no_engine(start):
    """At its end the loop cancels all tasks; an engine that is gone would never answer."""

    async def scenario():
        service, vllm = start()

        async def silent(method: str, **_: object) -> None:
            asked.append(method)
            await asyncio.Event().wait()

        vllm.collective_rpc = silent
        asyncio.create_task(use(service, "ab"))  # noqa: RUF006
        while not asked:
            await asyncio.sleep(0.01)

    asked: list[str] = []
    asyncio.run(scenario())
    assert asked == ["lego_stage"]


def test_gauges_follow_what_is_kept_after_the_last_request(start, tmp_path):
    def on_disk() -> float | None:
        return REGISTRY.get_sample_value("vllm_lego_cache_entries", {"tier": "disk"})

    async def scenario():
        service, vllm = start(store_dir=str(tmp_path / "store"))
        with vllm.staging.tiers._store._writing:  # as if the volume were slow
            await use(service, "ab")
            await asyncio.sleep(0.2)
            assert on_disk() == 0
        async with asyncio.timeout(10):
            while on_disk() != 1:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_who_stood_in_line_is_not_refused_for_a_queue_that_filled_meanwhile(start):
    size, gate = room_for_one(start), threading.Event()

    def check(adapter: LoraAdapter) -> None:
        if adapter.name == "f":
            gate.wait(30)

    async def scenario():
        service, _ = start(check, device_cache_bytes=size, max_queued_merges=1)
        async with AsyncExitStack() as slots:
            for name in "abcd":
                await slots.enter_async_context(service.serving_native(name))
            in_line = [asyncio.create_task(use(service, "ab"))]
            while service.slots.waiting() < 1:
                await asyncio.sleep(0.001)
            in_line.append(asyncio.create_task(use(service, "ac")))  # pushes the first out
            while service.slots.waiting() < 2:
                await asyncio.sleep(0.001)
            slow = asyncio.create_task(use(service, "af"))
            while not service.merged._merging:
                await asyncio.sleep(0.001)
        assert [served.result for served in await asyncio.gather(*in_line)] == ["miss", "miss"]
        assert not slow.done()
        gate.set()
        await slow

    asyncio.run(scenario())


def test_reading_members_has_a_limit(start):
    async def scenario():
        service, _ = start(merge_timeout_s=0.0)
        with pytest.raises(MergeTimeoutError, match="reading 2 adapters took longer than 0 s"):
            await use(service, "ab")

    asyncio.run(scenario())


def test_many_clients_of_one_set_cause_one_merge(start, folder):
    opened: list[str] = []
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" and opened else None
    )

    async def scenario():
        service, _ = start()
        opened.append("start")
        results = [s.result for s in await asyncio.gather(*(use(service, "abc") for _ in range(9)))]
        assert (results.count("miss"), results.count("coalesced")) == (1, 8)

    asyncio.run(scenario())
    for name in "abc":  # once for its digest, once for the merge
        assert opened.count(str(folder / name / "adapter_model.safetensors")) == 2
    opened.clear()


def test_a_merge_asked_for_by_its_id_while_it_is_made_is_waited_for(start):
    gate = threading.Event()

    async def scenario():
        service, _ = start(check=lambda adapter: gate.wait(30))
        making = asyncio.create_task(use(service, "ab"))
        while not service.merged._merging:
            await asyncio.sleep(0.001)
        (identity,) = service.merged._merging

        async def known():
            async with service.serving_known(identity) as serving:
                return serving

        asking = asyncio.create_task(known())
        await asyncio.sleep(0.01)
        assert not asking.done()
        gate.set()
        assert (await asking) == Serving((await making).model, "coalesced")

    asyncio.run(scenario())


def test_an_unknown_id_is_left_to_vllm(start):
    async def scenario():
        service, vllm = start()
        async with service.serving_known("lego-0123456789abcdef") as serving:
            assert serving is None
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_what_is_used_is_published_staged_and_registered_whatever_is_evicted(start):
    """Four clients, ten sets, room for four: each eviction races with new requests."""

    async def scenario():
        service, vllm = start()
        size = len(NAMES)
        await use(service, "ab")
        (one,) = service.merged.cache.snapshot().values()
        service, vllm = start(device_cache_bytes=4 * one.nbytes)
        draws = random.Random(size)  # noqa: S311
        sets = list(itertools.combinations("abcde", 2))

        async def client():
            for _ in range(100):
                wanted = AdapterSet(dict.fromkeys(draws.choice(sets), 1.0))
                async with service.serving(wanted, param="adapters") as serving:
                    for _ in range(draws.randrange(3)):
                        assert serving.model in vllm.merges()
                        assert serving.model in vllm.staging._merges
                        assert vllm.registered[engine_id(serving.model)] == serving.model
                        await asyncio.sleep(0)

        await asyncio.gather(*(client() for _ in range(4)))
        assert len(service.merged.cache) == 4
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_clients_that_leave_leave_nothing_behind(start):
    async def scenario():
        service, vllm = start()
        draws = random.Random(0)  # noqa: S311
        sets = list(itertools.combinations(NAMES, 2))

        async def leaves():
            asking = asyncio.create_task(use(service, draws.choice(sets)))
            await asyncio.sleep(draws.random() * 0.02)
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking

        await asyncio.gather(*(leaves() for _ in range(100)))
        await asyncio.gather(*(task for _, task in service.merged._merging.values()))
        await asyncio.gather(*service.merged._registering.values())
        await asyncio.sleep(0)
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_a_merge_over_the_limit_is_a_timeout_and_can_be_asked_for_again(start):
    gate = threading.Event()

    async def scenario():
        service, vllm = start(check=lambda adapter: gate.wait(30), merge_timeout_s=0.05)
        with pytest.raises(MergeTimeoutError, match=r"longer than 0\.05 s"):
            await use(service, "ab")
        await asyncio.sleep(0)
        assert nothing_left(service, vllm)
        gate.set()
        while True:  # until the thread has got through what it was at
            with suppress(MergeTimeoutError):
                assert (await use(service, "ab")).result in ("miss", "hit")  # it was made meanwhile
                break
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_a_full_queue_refuses(start):
    gate = threading.Event()

    async def scenario():
        service, _ = start(check=lambda adapter: gate.wait(30), max_queued_merges=1)
        first = asyncio.create_task(use(service, "ab"))
        while not service.merged._merging:
            await asyncio.sleep(0.001)
        with pytest.raises(BusyError, match="1 merges are waiting"):
            await use(service, "ac")
        gate.set()
        assert (await first).result == "miss"

    asyncio.run(scenario())


def test_a_merge_larger_than_the_cache_names_the_setting(start):
    async def scenario():
        service, vllm = start(device_cache_bytes=10)
        with pytest.raises(UnmergeableError, match="VLLM_LEGO_DEVICE_CACHE_BYTES"):
            await use(service, "ab")
        await asyncio.sleep(0)
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def room_for_one(start: Any) -> int:
    """Bytes of one merge of two."""

    async def measured():
        service, _ = start()
        await use(service, "ab")
        (one,) = service.merged.cache.snapshot().values()
        return one.nbytes

    return asyncio.run(measured())


def test_what_is_in_use_is_not_pushed_out_and_the_next_waits(start):
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size)
        async with service.serving(AdapterSet({"a": 1.0, "b": 1.0}), param="adapters") as serving:
            waiting = asyncio.create_task(use(service, "ac"))
            while len(vllm.staging._merges) < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert not waiting.done()
            assert vllm.merges() == {serving.model}
        assert (await waiting).result == "miss"
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_waiting_for_room_ends_at_the_limit(start):
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size, merge_timeout_s=0.3)
        async with service.serving(AdapterSet({"a": 1.0, "b": 1.0}), param="adapters"):
            with pytest.raises(MergeTimeoutError):
                await use(service, "ac")
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_what_the_engine_still_works_on_is_not_pushed_out(start):
    """A client that left has ended its HTTP request, but its request is not out of the engine."""
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size)
        first = (await use(service, "ab")).model
        vllm.output_processor.request_states["r"] = SimpleNamespace(lora_name=first)
        waiting = asyncio.create_task(use(service, "ac"))
        while len(vllm.staging._merges) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert vllm.merges() == {first}
        vllm.output_processor.request_states.clear()
        assert (await waiting).result == "miss"
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_an_evicted_merge_is_known_and_comes_back_as_a_hit(start):
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size)
        first = (await use(service, "ab")).model
        await use(service, "ac")
        assert first not in vllm.merges()
        listed = {Recipe.decode(m.recipe).merge_id: tier for tier, m in await service.merges()}
        assert listed[first] == "host"
        async with service.serving_known(first) as serving:
            assert serving == Serving(first, "hit")
            assert vllm.merges() == {first}
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_an_id_whose_members_are_gone_and_that_no_tier_has_is_unknown(start, folder):
    size = room_for_one(start)

    async def scenario():
        service, _ = start(device_cache_bytes=size, host_cache_bytes=0)
        first = (await use(service, "ab")).model
        await use(service, "ac")
        (folder / "b" / "adapter_model.safetensors").write_bytes(b"other")
        with pytest.raises(UnknownAdapterError, match=first):
            async with service.serving_known(first):
                pass

    asyncio.run(scenario())


def test_a_restarted_server_serves_what_the_store_has_without_merging(start, tmp_path):
    store = str(tmp_path / "store")

    async def scenario():
        service, vllm = start(store_dir=store)
        first = await use(service, "ab")
        vllm.staging._threads.shutdown()
        service, vllm = start(store_dir=store)
        listed = {Recipe.decode(m.recipe).merge_id: tier for tier, m in await service.merges()}
        assert listed == {first.model: "disk"}
        async with service.serving_known(first.model) as serving:
            assert serving == Serving(first.model, "hit")
        service, vllm = start(store_dir=store)
        assert await use(service, "ab") == Serving(first.model, "hit")
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_workers_that_disagree_are_refused_and_none_keeps_its_own(start, tmp_path):
    store = tmp_path / "store"

    async def scenario():
        service, vllm = start(store_dir=str(store))
        ask = vllm.collective_rpc

        async def two_workers(method: str, args: tuple[Any, ...]) -> list[Any]:
            (one,) = await ask(method, args)
            if method != "lego_stage":
                return [one, one]
            other = json.loads(json.dumps(one))
            for merge in other["merges"].values():
                if merge["state"] == "ready":
                    merge["fingerprint"] = "0123456789abcdef"
            return [one, other]

        vllm.collective_rpc = two_workers
        with pytest.raises(WorkersDisagreeError):
            await use(service, "ab")
        await asyncio.sleep(0)
        assert nothing_left(service, vllm)
        assert not vllm.staging.tiers.in_host_memory()
        assert not list(store.glob("*.safetensors"))

    asyncio.run(scenario())


def test_a_set_that_needs_the_room_of_busy_ones_gets_it(start):
    """Two sets, one for each half of the room, always with two overlapping requests."""
    size = room_for_one(start)

    async def scenario():
        service, _ = start(device_cache_bytes=2 * size, slot_quantum_s=0.05, merge_timeout_s=5.0)
        done = asyncio.Event()

        async def keep_busy(names: str, delay: float) -> None:
            await asyncio.sleep(delay)
            wanted = AdapterSet(dict.fromkeys(names, 1.0))
            while not done.is_set():
                async with service.serving(wanted, param="adapters"):
                    await asyncio.sleep(0.02)

        await use(service, "ab")
        await use(service, "ac")
        traffic = [
            asyncio.create_task(keep_busy(names, delay))
            for names in ("ab", "ac")
            for delay in (0, 0.01)
        ]
        await asyncio.sleep(0.1)
        assert (await use(service, "ad")).result == "miss"  # it would get 504
        assert not any(task.done() for task in traffic)
        done.set()
        await asyncio.gather(*traffic)

    asyncio.run(scenario())


def test_at_a_shutdown_single_adapters_are_refused_too(start):
    """Or steady traffic on one would keep the server from ever draining."""

    async def scenario():
        service, _ = start()
        async with service.serving_native("a"):
            draining = asyncio.create_task(service.drain())
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDownError):
                await use(service, "a")
            async with service.serving_native("base"):
                pass
        await asyncio.wait_for(draining, 5)

    asyncio.run(scenario())


def test_one_call_asks_for_all_merges(start):
    gate = threading.Event()

    async def scenario():
        service, vllm = start(check=lambda adapter: gate.wait(30), merge_threads=3)
        ask, asked = vllm.collective_rpc, []

        async def counted(method: str, args: tuple[Any, ...]) -> list[Any]:
            if method == "lego_stage":
                asked.append(len(args[0]))
            return await ask(method, args)

        vllm.collective_rpc = counted
        using = [asyncio.create_task(use(service, names)) for names in ("ab", "ac", "ad")]
        while not asked or asked[-1] < 3:
            await asyncio.sleep(0.001)
        gate.set()
        assert [serving.result for serving in await asyncio.gather(*using)] == ["miss"] * 3

    asyncio.run(scenario())


def test_vllm_failing_to_load_a_merge_is_an_error_and_leaves_nothing(start):
    async def scenario():
        service, vllm = start()
        vllm.broken = True
        with pytest.raises(MergeFailedError) as caught:
            await use(service, "ab")
        assert "slots" not in str(caught.value)
        await asyncio.sleep(0)
        assert nothing_left(service, vllm)
        vllm.broken = False
        assert (await use(service, "ab")).result in ("miss", "hit")  # it was made, not registered

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_a_damaged_member_is_named_and_repaired_it_works(start, folder, damage, says):
    whole = {path: path.read_bytes() for path in (folder / "b").iterdir()}

    async def scenario():
        service, vllm = start()
        damage(folder / "b")
        with pytest.raises(UnmergeableError, match="'b'") as caught:
            await use(service, "ab")
        assert says in str(caught.value)
        await asyncio.sleep(0)
        assert nothing_left(service, vllm)
        for path, content in whole.items():
            path.write_bytes(content)
        await asyncio.sleep(SHARED_S)  # requests may share a look for so long
        assert (await use(service, "ab")).result == "miss"

    asyncio.run(scenario())


def test_one_adapter_is_served_as_it_is_mergeable_or_not(start, folder):
    config = json.loads((folder / "f" / "adapter_config.json").read_text())
    config["modules_to_save"] = ["lm_head"]
    (folder / "f" / "adapter_config.json").write_text(json.dumps(config))

    async def scenario():
        service, _ = start()
        assert await use(service, "f") == Serving("f", None)
        with pytest.raises(UnmergeableError, match="modules_to_save"):
            await use(service, "f", f=0.5)
        with pytest.raises(UnknownAdapterError, match="'z' is not served here"):
            await use(service, "z")

    asyncio.run(scenario())


def test_every_refusal_is_a_serving_error(start):
    async def scenario():
        service, _ = start()
        for fields in ({"rank": 9}, {"rank": "8"}, {"nonsense": 1}, {"seed": -1}):
            wanted = AdapterSet({"a": 1.0, "b": 1.0}, fields)
            with pytest.raises(ServingError) as caught:
                async with service.serving(wanted, param="adapters"):
                    pass
            assert caught.value.status == 400
            assert caught.value.param == f"merge.{next(iter(fields))}"

    asyncio.run(scenario())


def test_api_servers_share_the_budget_and_the_slots(folder):
    shared = PlayedVllm(folder, lambda adapter: None, Settings(), _api_process_count=2)
    engine = Engine(shared, shared.state)
    assert (engine.api_servers, engine.slots) == (2, 4)


def test_single_adapters_stand_in_the_same_line_as_sets(start):
    """Four slots: four adapters of vLLM's own keep a set waiting, and it keeps the fifth waiting."""

    async def scenario():
        service, _ = start()
        async with AsyncExitStack() as stack:
            for name in "abcd":
                await stack.enter_async_context(service.serving_native(name))
            waiting = asyncio.create_task(use(service, "ab"))
            while not service.slots.waiting():
                await asyncio.sleep(0.001)
            fifth = asyncio.create_task(use(service, "e"))
            async with service.serving_native("base"):  # takes no slot
                pass
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert not fifth.done()
        assert (await waiting).result == "miss"
        assert (await fifth) == Serving("e", None)

    asyncio.run(scenario())


def test_what_pushes_in_waits_for_what_is_known(start):
    """More sets than slots, and room for fewer than slots: everybody is served in the end."""
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=2 * size, max_queued_merges=64)
        sets = list(itertools.combinations(NAMES, 2))

        async def client(wanted):
            async with service.serving(
                AdapterSet(dict.fromkeys(wanted, 1.0)), param="a"
            ) as serving:
                assert serving.model in vllm.merges()
                await asyncio.sleep(0.001)

        await asyncio.gather(*(client(wanted) for wanted in sets * 3))
        assert nothing_left(service, vllm)
        assert service.slots.waiting() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        (b'{"model": "e"}', True),
        (b'{"model" : "e", "adapters": []}', True),
        (b'{"model": "\\u0065"}', True),
        (b'{"mod\\u0065l": "e"}', True),
        (b'{"model": "\\u0065", "x": {"model": "base"}}', True),
        ('{"model": "e"}'.encode("utf-16"), True),
        (b'{"x": [' + b'{"model": "base"}, ' * 40 + b'{}], "model": "e"}', True),
        (b'{"model": "a"}', False),  # has a slot
        (b'{"model": "base"}', False),
        (b'{"tools": [{"model": "e"}], "model": "base"}', False),
        (b'{"tools": [{"model": "e"}], "model": "f"}', True),
        (b'{"model": "f"', True),  # a lone name is not worth parsing for
    ],
)
def test_a_request_of_a_single_adapter_waits_for_its_slot_and_passes_untouched(start, body, waits):
    async def scenario():
        service, _ = start()
        interception = Interception(echo)
        interception.start(service, 1000, ())
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        sent: list[dict[str, Any]] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        async with AsyncExitStack() as stack:
            for name in "abcd":
                await stack.enter_async_context(service.serving_native(name))
            request = asyncio.create_task(interception(scope, receive, send))
            for _ in range(10):
                await asyncio.sleep(0)
            assert request.done() is not waits
            assert service.slots.waiting() == waits
        await request
        assert sent[1]["body"] == body

    asyncio.run(scenario())


def test_what_is_on_its_way_back_is_not_served_before_it_is_there(start):
    """Pushed out while its request stands in line, fetched again by another, not yet registered."""
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size)
        registering, stock = asyncio.Event(), vllm.add_lora
        registering.set()

        async def add_lora(request: Any) -> bool:
            await registering.wait()
            return await stock(request)

        vllm.add_lora = add_lora
        served: list[bool] = []

        async def client(names: str):
            wanted = AdapterSet(dict.fromkeys(names, 1.0))
            async with service.serving(wanted, param="adapters") as serving:
                served.append(serving.model in vllm.merges())

        async def waiting(names: int):
            while service.slots.waiting() < names:
                await asyncio.sleep(0.001)

        async with AsyncExitStack() as stack:
            for name in "abcd":
                await stack.enter_async_context(service.serving_native(name))
            clients = [asyncio.create_task(client("ab"))]
            await waiting(1)
            clients.append(asyncio.create_task(client("ac")))  # pushes the first out
            await waiting(2)
            registering.clear()
            clients.append(asyncio.create_task(client("ab")))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert served == []
        registering.set()
        await asyncio.gather(*clients)
        assert served == [True] * 3
        assert nothing_left(service, vllm)

    asyncio.run(scenario())
