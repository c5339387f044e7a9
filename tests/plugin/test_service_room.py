"""What does not fit at once: queues, room on the device, slots, and the limit of waiting. vLLM is played."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from lego_core import LoraAdapter
from tests.plugin.played_vllm import NAMES, holding, nothing_left, room_for_one, use
from tests.plugin.test_interception import echo
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import BusyError, MergeTimeoutError, UnmergeableError
from vllm_lego.identity import engine_id
from vllm_lego.interception import Interception
from vllm_lego.recipe import Recipe
from vllm_lego.service import Serving


def test_who_stood_in_line_is_not_refused_for_a_queue_that_filled_meanwhile(start):
    size, gate = room_for_one(start), threading.Event()

    def check(adapter: LoraAdapter) -> None:
        if adapter.name == "f":
            gate.wait(30)

    async def scenario():
        service, _ = start(check, device_cache_bytes=size, max_queued_merges=1)
        with ExitStack() as slots:
            for name in "abcd":
                await service.serve_native(name, slots)
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
                async with holding(service.serve, wanted, param="adapters") as serving:
                    for _ in range(draws.randrange(3)):
                        assert serving.model in vllm.merges()
                        assert serving.model in vllm.staging._merges
                        assert vllm.registered[engine_id(serving.model)] == serving.model
                        await asyncio.sleep(0)

        await asyncio.gather(*(client() for _ in range(4)))
        assert len(service.merged.cache) == 4
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


def test_what_is_in_use_is_not_pushed_out_and_the_next_waits(start):
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size)
        async with holding(
            service.serve, AdapterSet({"a": 1.0, "b": 1.0}), param="adapters"
        ) as serving:
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
        async with holding(service.serve, AdapterSet({"a": 1.0, "b": 1.0}), param="adapters"):
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
        listed: dict[str, str] = {}
        async with asyncio.timeout(10):
            while first not in listed:  # it is kept once it has been registered
                listed = {Recipe.decode(m.recipe).merge_id: t for t, m in await service.merges()}
        assert listed[first] == "host"
        async with holding(service.serve_known, first) as serving:
            assert serving == Serving(first, "hit")
            assert vllm.merges() == {first}
        assert nothing_left(service, vllm)

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
                async with holding(service.serve, wanted, param="adapters"):
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


def test_single_adapters_stand_in_the_same_line_as_sets(start):
    """Four slots: four adapters of vLLM's own keep a set waiting, and it keeps the fifth waiting."""

    async def scenario():
        service, _ = start()
        with ExitStack() as stack:
            for name in "abcd":
                await service.serve_native(name, stack)
            waiting = asyncio.create_task(use(service, "ab"))
            while not service.slots.waiting():
                await asyncio.sleep(0.001)
            fifth = asyncio.create_task(use(service, "e"))
            async with holding(service.serve_native, "base"):  # takes no slot
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
            async with holding(
                service.serve, AdapterSet(dict.fromkeys(wanted, 1.0)), param="a"
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

        with ExitStack() as stack:
            for name in "abcd":
                await service.serve_native(name, stack)
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
            async with holding(service.serve, wanted, param="adapters") as serving:
                served.append(serving.model in vllm.merges())

        async def waiting(names: int):
            while service.slots.waiting() < names:
                await asyncio.sleep(0.001)

        with ExitStack() as stack:
            for name in "abcd":
                await service.serve_native(name, stack)
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
