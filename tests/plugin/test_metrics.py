"""The metrics: documented, bounded, there from the start, and moved by what happens."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from lego_core.methods import METHODS
from tests.metrics_table import documented, exposed, registered
from tests.plugin.played_vllm import holding, nothing_left, use
from tests.plugin.test_interception import echo
from vllm_lego import errors, metrics
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.interception import Interception


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
        async with holding(service.serve, pair("ab"), param="adapters"):
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
        async with holding(service.serve, pair("ab"), param="adapters"):
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


def errors_total(reason: str) -> float:
    return value("vllm_lego_errors_total", reason=reason)


def requests_total() -> dict[str, float]:
    return {r: value("vllm_lego_requests_total", result=r) for r in metrics.RESULTS}


async def post(service, body: dict[str, Any], left: asyncio.Event) -> list[int]:
    """Send a request whose client leaves at some time. Returns the status, if one was sent."""
    interception = Interception(echo)
    interception.start(service, 1 << 20, ["key"])
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if not left.is_set() and "status" in message:
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer key")]
    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    await interception(scope, receive, send)
    return statuses


async def ended(task: asyncio.Task[list[int]]) -> list[int]:
    """Wait for a task, without cancelling it: that would be what is tested."""
    done, _ = await asyncio.wait({task}, timeout=20)
    assert done
    return task.result()


def test_clients_that_leave_while_they_wait_are_counted_and_wait_no_longer(start):
    async def scenario():
        read_on = threading.Event()
        service, vllm = start(lambda adapter: read_on.wait(60))
        left, stays = asyncio.Event(), asyncio.Event()
        asked = {"adapters": ["a", "b"]}
        leaves = asyncio.create_task(post(service, asked, left))
        remains = asyncio.create_task(post(service, asked, stays))
        await until(lambda: waiting() == (2, 0, 0))
        left.set()
        assert await ended(leaves) == []
        assert waiting() == (1, 0, 0)
        assert errors_total("cancelled") == 1
        read_on.set()
        assert await remains == [200]
        with ExitStack() as held:
            for name in "abcd":  # every slot
                await service.serve_native(name, held)
            for body in asked, {"model": "e"}:
                left = asyncio.Event()
                leaves = asyncio.create_task(post(service, body, left))
                await until(lambda: waiting() == (0, 0, 1))
                left.set()
                assert await ended(leaves) == []
                assert waiting() == (0, 0, 0)
                assert not service.slots.waiting()
        assert errors_total("cancelled") == 3
        counted = requests_total()
        assert sum(counted.values()) == counted["coalesced"] + counted["miss"] == 1
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_the_end_of_the_server_is_not_a_client_that_leaves(start):
    async def scenario():
        read_on = threading.Event()
        service, _ = start(lambda adapter: read_on.wait(60))
        asking = asyncio.create_task(post(service, {"adapters": ["a", "b"]}, asyncio.Event()))
        await until(lambda: waiting() == (1, 0, 0))
        asking.cancel()
        await asyncio.wait([asking])
        read_on.set()
        assert asking.cancelled()
        assert errors_total("cancelled") == 0

    asyncio.run(scenario())


def test_a_merge_that_fails_when_all_have_left_is_an_error(start, folder):
    async def scenario():
        read_on = threading.Event()
        service, _ = start(lambda adapter: read_on.wait(60))
        (folder / "b" / "adapter_model.safetensors").write_bytes(b"x" * 99)
        left = asyncio.Event()
        leaves = asyncio.create_task(post(service, {"adapters": ["a", "b"]}, left))
        await until(lambda: waiting() == (1, 0, 0))
        left.set()
        await leaves
        assert errors_total("unmergeable") == 0
        read_on.set()
        await until(lambda: errors_total("unmergeable") == 1)
        assert sum(requests_total().values()) == 0

    asyncio.run(scenario())


def test_a_refused_request_that_names_no_set_is_no_request_for_one(start):
    async def scenario():
        service, _ = start()
        await service.drain()
        stays = asyncio.Event()
        assert await post(service, {"model": "a"}, stays) == [503]
        assert errors_total("shutting_down") == 1
        assert sum(requests_total().values()) == 0
        assert await post(service, {"adapters": ["a", "b"]}, stays) == [503]
        assert await post(service, {"adapters": "a"}, stays) == [400]
        assert requests_total()["error"] == 2

    asyncio.run(scenario())


def test_what_is_kept_is_shown_at_the_start_and_after_a_drop(start, tmp_path):
    def shown() -> list[float]:
        return [value("vllm_lego_cache_entries", tier=tier) for tier in metrics.TIERS]

    def nbytes() -> list[float]:
        return [value("vllm_lego_cache_bytes", tier=tier) for tier in metrics.TIERS]

    async def scenario():
        store = str(tmp_path / "store")
        service, _ = start(store_dir=store)
        first, _ = await use(service, "ab"), await use(service, "cd")
        await until(lambda: shown() == [2, 2, 2])
        before = nbytes()
        await service.drop(first.model)
        assert shown() == [1, 1, 1]
        assert [a < b for a, b in zip(nbytes(), before, strict=True)] == [True] * 3
        service.metrics.set_tier("disk", 0, 0)  # as in a new process
        later, _ = start(store_dir=store)
        await later.merged.show_tiers()
        assert shown()[1:] == [0, 1]

    asyncio.run(scenario())


def test_slots_and_who_waits_for_one(start):
    async def scenario():
        service, _ = start()
        assert value("vllm_lego_slots_in_use") == 0
        held = [holding(service.serve_native, name) for name in "abcd"]
        for one in held:
            await one.__aenter__()
        async with holding(service.serve_native, "a"):  # the same name takes no other
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
