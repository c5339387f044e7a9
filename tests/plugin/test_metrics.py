"""The metrics: documented, bounded, there from the start, and moved by what happens."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from lego_core.methods import METHODS
from tests.metrics_table import documented, exposed, registered
from tests.plugin.test_service import (  # noqa: F401  the fixtures
    PlayedVllm,
    _patched,
    folder,
    start,
    use,
)
from vllm_lego import errors, metrics
from vllm_lego.adapter_set import AdapterSet

# ruff: noqa: F811  a fixture's name is its test's argument


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, labels)
    assert found is not None, f"{name} {labels}"
    return found


def test_the_document_lists_every_metric_with_its_kind_and_the_values_of_its_labels():
    table = documented()
    shown = dict(exposed(registered()))
    info = shown.pop("vllm_lego_info")
    assert shown == {name: row for name, row in table.items() if name != "vllm_lego_info"}
    assert (info.kind, table["vllm_lego_info"].kind) == ("gauge", "gauge")


def test_the_values_of_labels_are_from_closed_lists():
    labels = {name: values for row in documented().values() for name, values in row.labels.items()}
    assert set(labels) == {
        *("result", "tier", "phase", "method", "operation", "reason"),
        *("version", "rank", "max_loras"),
    }
    assert documented()["vllm_lego_merge_fidelity"].labels["method"] == set(METHODS)
    kinds = [errors.ServingError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert set(metrics.ERRORS) > {kind.reason for kind in kinds}


def waiting() -> tuple[float, ...]:
    return tuple(value("vllm_lego_waiting_requests", reason=r) for r in ("merge", "room", "slot"))


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def evicted(tier: str = "device") -> float:
    return value("vllm_lego_cache_evicted_idle_seconds_count", tier=tier)


def one_merge(start) -> int:
    """Bytes of a merge of two."""

    async def scenario():
        service, _ = start()
        return (await use(service, "ab"), service.merged.cache.currsize)[1]

    return int(asyncio.run(scenario()))


def test_what_a_server_was_started_with(start):
    start(device_cache_bytes=1000, host_cache_bytes=0, store_bytes=3000, method="svd", rank=4)
    capacity = {t: value("vllm_lego_cache_capacity_bytes", tier=t) for t in metrics.TIERS}
    assert capacity == {"device": 1000, "host": 0, "disk": 0}  # no folder, no store
    assert value("vllm_lego_slots") == 4
    (labels,) = [
        s.labels for m in REGISTRY.collect() if m.name == "vllm_lego_info" for s in m.samples
    ]
    assert labels.pop("version")
    assert labels == {"method": "svd", "rank": "4", "max_loras": "4"}


def test_requests_that_wait_for_a_merge_are_counted_each(start):
    in_progress = "vllm_lego_merges_in_progress"

    async def scenario():
        read_on = threading.Event()  # the members are not loaded before
        service, _ = start(lambda adapter: read_on.wait(60))
        first, second = (asyncio.create_task(use(service, "ab")) for _ in range(2))
        other = asyncio.create_task(use(service, "cd"))
        await until(lambda: waiting() == (3, 0, 0) and value(in_progress) == 2)
        second.cancel()
        await asyncio.wait([second])
        assert waiting() == (2, 0, 0)
        read_on.set()
        await asyncio.gather(first, other)
        assert (waiting(), value(in_progress)) == ((0, 0, 0), 0)

    asyncio.run(scenario())


def test_a_merge_that_waits_for_room(start):
    async def scenario(size):
        service, _ = start(device_cache_bytes=size)
        await use(service, "ab")  # what is read the first time is read
        before = value("vllm_lego_wait_seconds_sum", reason="room")
        async with service.serving(pair("ab"), param="adapters"):
            second = asyncio.create_task(use(service, "cd"))
            await until(lambda: waiting() == (0, 1, 0))
            await asyncio.sleep(0.2)
        await second
        assert waiting() == (0, 0, 0)
        assert 0.2 <= value("vllm_lego_wait_seconds_sum", reason="room") - before < 20
        assert evicted() == 1

    asyncio.run(scenario(one_merge(start)))


def pair(names: str):
    return AdapterSet(dict.fromkeys(sorted(names), 1.0))


def test_an_evicted_merge_had_lain_unused_since_its_last_request_ended(start):
    async def scenario(size):
        service, _ = start(device_cache_bytes=size)
        async with service.serving(pair("ab"), param="adapters"):
            await asyncio.sleep(0.3)  # in use: does not count
            began = time.monotonic()
        await asyncio.sleep(0.2)
        before = value("vllm_lego_cache_evicted_idle_seconds_sum", tier="device")
        await use(service, "cd")
        took = time.monotonic() - began
        idle = value("vllm_lego_cache_evicted_idle_seconds_sum", tier="device") - before
        assert 0.2 <= idle < took
        assert evicted() == value("vllm_lego_cache_evictions_total", tier="device") == 1

    asyncio.run(scenario(one_merge(start)))


def test_slots_and_who_waits_for_one(start):
    async def scenario():
        service, _ = start()
        assert value("vllm_lego_slots_in_use") == 0
        held = [service.serving_native(name) for name in "abcd"]
        for one in held:
            await one.__aenter__()
        async with service.serving_native("a"):  # the same name takes no other
            assert value("vllm_lego_slots_in_use") == value("vllm_lego_slots") == 4
        late = asyncio.create_task(use(service, "ef"))
        left = asyncio.create_task(use(service, "e"))
        await until(lambda: waiting() == (0, 0, 2))
        left.cancel()
        await asyncio.sleep(0.2)
        before = value("vllm_lego_wait_seconds_sum", reason="slot")
        assert waiting() == (0, 0, 1)
        await held[0].__aexit__(None, None, None)
        await late
        assert 0.2 <= value("vllm_lego_wait_seconds_sum", reason="slot") - before < 20
        for one in held[1:]:
            await one.__aexit__(None, None, None)
        assert value("vllm_lego_slots_in_use") == 0
        # Five were admitted at once, one waited, one waited in vain.
        assert value("vllm_lego_wait_seconds_count", reason="slot") == 7

    asyncio.run(scenario())


def test_the_stores_reads_and_writes_are_timed(start, tmp_path):
    async def scenario():
        service, _ = start(store_dir=str(tmp_path / "store"))
        await use(service, "ab")
        await until(lambda: value("vllm_lego_store_seconds_count", operation="write") == 1)
        later, _ = start(store_dir=str(tmp_path / "store"))
        assert (await use(later, "ab")).result == "hit"
        await until(lambda: value("vllm_lego_store_seconds_count", operation="read") == 1)
        for operation in metrics.OPERATIONS:
            assert 0 < value("vllm_lego_store_seconds_sum", operation=operation) < 20
        assert value("vllm_lego_cache_hits_total", tier="disk") == 1

    asyncio.run(scenario())


API_SERVER = """
import sys
from vllm_lego.metrics import Metrics
metrics = Metrics()
metrics.describe({"device": 500, "host": 7, "disk": 0}, 2, method="lego", rank=8, max_loras=4)
metrics.slots_in_use.set(1)
metrics.waiting.labels("slot").set(3)
metrics.set_tier("host", 5, int(sys.argv[1]))
metrics.wait_seconds.labels("slot").observe(1)
"""


def test_several_api_servers_are_one_server_to_prometheus(tmp_path):
    """As vLLM collects them: from files, one a process."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for nbytes in "10", "30":
        subprocess.run([sys.executable, "-c", API_SERVER, nbytes], env=environment, check=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))

    def of_both(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert of_both("vllm_lego_wait_seconds_count", reason="slot") == 2
    assert of_both("vllm_lego_slots") == 4
    assert of_both("vllm_lego_slots_in_use") == 2
    assert of_both("vllm_lego_waiting_requests", reason="slot") == 6
    assert of_both("vllm_lego_cache_capacity_bytes", tier="device") == 500
    assert of_both("vllm_lego_cache_bytes", tier="host") == 30
    assert of_both("vllm_lego_cache_entries", tier="host") == 5
    assert dict(exposed(registry.collect())) == documented()
    (info,) = [s for m in registry.collect() if m.name == "vllm_lego_info" for s in m.samples]
    assert info.value == 1
