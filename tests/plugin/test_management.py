"""Merging ahead, dropping, and what a background response keeps. vLLM is played."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from tests.plugin.played_vllm import NAMES, holding, nothing_left, use
from tests.plugin.test_interception import echo
from vllm_lego._vllm import Engine
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import (
    BadRequestError,
    InUseError,
    MergeFailedError,
    MergeTimeoutError,
    UnknownAdapterError,
)
from vllm_lego.interception import Interception
from vllm_lego.service import LegoService

PAIR = AdapterSet({"a": 1.0, "b": 1.0})


async def ids(service: LegoService) -> set[tuple[str, str]]:
    return {(tier, identity(merge)) for tier, merge in await service.merges()}


def identity(merge: Any) -> str:
    return merge.recipe.partition('"id":"')[2][:21]


def test_a_merge_made_ahead_is_a_hit_and_takes_no_slot(start):
    async def scenario():
        service, vllm = start()
        with ExitStack() as stack:
            for name in "cdef":  # every slot is taken
                await service.serve_native(name, stack)
            result, merge, seconds = await service.prepare(PAIR)
            assert (result, set(seconds)) == (
                "miss",
                {"queue", "load", "merge", "total"},
            )
            assert (await service.prepare(PAIR))[::2] == ("hit", {})
            assert not vllm.registered  # vLLM would have pushed out an adapter that runs
        serving = await use(service, "ba")
        assert (serving.model, serving.result) == (identity(merge), "hit")
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_asked_for_at_once_it_is_made_once(start):
    async def scenario():
        service, vllm = start()
        results = [r for r, *_ in await asyncio.gather(*(service.prepare(PAIR) for _ in range(5)))]
        assert (results.count("miss"), results.count("coalesced")) == (1, 4)
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_there_is_nothing_to_merge_of_one(start):
    async def scenario():
        service, _ = start()
        with pytest.raises(BadRequestError, match="'a' alone"):
            await service.prepare(AdapterSet({"a": 1.0}))
        with pytest.raises(UnknownAdapterError, match="'z'"):
            await service.prepare(AdapterSet({"z": 1.0}))
        assert (await service.prepare(AdapterSet({"a": 0.5})))[0] == "miss"

    asyncio.run(scenario())


def test_what_is_dropped_is_in_no_tier(start, tmp_path):
    async def scenario():
        service, vllm = start(store_dir=str(tmp_path / "store"))
        merge = (await use(service, "ab")).model
        kept = (await use(service, "ac")).model
        while not (tmp_path / "store" / f"{kept}.safetensors").exists():
            await asyncio.sleep(0.001)
        assert await service.drop(merge) is False
        assert await ids(service) == {("device", kept)}
        assert [f.name for f in (tmp_path / "store").iterdir()] == [f"{kept}.safetensors"]
        assert merge not in vllm.names
        assert nothing_left(service, vllm)
        async with holding(service.serve_known, merge) as serving:
            assert serving is None  # vLLM says that there is no such model
        with pytest.raises(UnknownAdapterError, match=merge):
            await service.drop(merge)
        again = await use(service, "ab")
        assert (again.model, again.result) == (merge, "miss")

    asyncio.run(scenario())


def test_what_left_the_device_or_is_of_an_earlier_server_can_be_dropped(start, tmp_path):
    async def scenario():
        service, _ = start(store_dir=str(tmp_path / "store"))
        merge = (await use(service, "ab")).model
        later, vllm = start(store_dir=str(tmp_path / "store"), host_cache_bytes=0)
        while not list((tmp_path / "store").glob("lego-*.safetensors")):
            await asyncio.sleep(0.001)
        assert await ids(later) == {("disk", merge)}
        assert await later.drop(merge) is False
        assert await ids(later) == set()
        assert nothing_left(later, vllm)
        assert await ids(service) == {("device", merge)}  # a replica keeps what is its own

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["lego-0123456789abcdef", "a", "", "../x"])
def test_nothing_but_a_merge_can_be_dropped(start, tmp_path, name):
    (tmp_path / "x.safetensors").write_text("precious")

    async def scenario():
        service, _ = start(store_dir=str(tmp_path / "store"))
        with pytest.raises(UnknownAdapterError, match="not kept here"):
            await service.drop(name)

    asyncio.run(scenario())
    assert (tmp_path / "x.safetensors").exists()


def test_a_merge_in_use_or_being_made_is_not_dropped(start):
    gate = threading.Event()

    async def scenario():
        service, vllm = start(check=lambda adapter: gate.wait(30))
        preparing = asyncio.create_task(service.prepare(PAIR))
        while not service.merged._merging:
            await asyncio.sleep(0.001)
        (merge,) = service.merged._merging
        with pytest.raises(InUseError, match=merge):
            await service.drop(merge)
        gate.set()
        await preparing
        async with holding(service.serve, PAIR, param="adapters"):
            with pytest.raises(InUseError):
                await service.drop(merge)
        vllm.output_processor.request_states["r"] = SimpleNamespace(lora_name=merge)
        with pytest.raises(InUseError):
            await service.drop(merge)  # the client has left, the engine is still at it
        vllm.output_processor.request_states.clear()
        await service.drop(merge)
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_a_merge_that_is_still_being_written_is_dropped_after_that(start, tmp_path):
    gate = threading.Event()

    async def scenario():
        service, vllm = start(store_dir=str(tmp_path / "store"), merge_timeout_s=2.0)
        keep = vllm.staging.tiers.keep
        vllm.staging.tiers.keep = lambda *args: gate.wait(30) and keep(*args)
        merge = (await use(service, "ab")).model
        with pytest.raises(MergeTimeoutError, match="still being written"):
            await service.drop(merge)
        dropping = asyncio.create_task(service.drop(merge))
        await asyncio.sleep(0.02)
        gate.set()
        await dropping
        assert await ids(service) == set()
        assert list((tmp_path / "store").iterdir()) == []

    asyncio.run(scenario())


def test_a_store_that_keeps_it_is_an_error(start, tmp_path):
    async def scenario():
        service, _ = start(store_dir=str(tmp_path / "store"))
        merge = (await use(service, "ab")).model
        while not (tmp_path / "store" / f"{merge}.safetensors").exists():
            await asyncio.sleep(0.001)
        (tmp_path / "store" / f"{merge}.safetensors").unlink()
        (tmp_path / "store" / f"{merge}.safetensors").mkdir()  # which unlink cannot remove
        with pytest.raises(MergeFailedError, match=merge) as caught:
            await service.drop(merge)
        assert str(tmp_path) not in str(caught.value)

    asyncio.run(scenario())


def test_what_another_api_server_serves_stays_on_the_device_for_it(start):
    async def scenario():
        service, vllm = start()
        other, other_vllm = start()
        other_vllm.staging, other_vllm.worker = vllm.staging, vllm.worker
        merge = (await use(service, "ab")).model
        assert (await use(other, "ab")).model == merge
        assert await service.drop(merge) is True
        assert merge not in vllm.names
        assert merge in other_vllm.names
        assert (await use(other, "ab")).result == "hit"
        assert await other.drop(merge) is False
        assert set(vllm.staging._merges) == set()

    asyncio.run(scenario())


def test_dropping_while_others_ask_leaves_nothing_inconsistent(start, tmp_path):
    async def scenario():
        service, vllm = start(store_dir=str(tmp_path / "store"))
        draws = random.Random(0)  # noqa: S311
        sets = list(itertools.combinations(NAMES[:4], 2))
        refused = {"in use": 0, "unknown": 0, "dropped": 0}

        async def asks():
            for _ in range(40):
                wanted = AdapterSet(dict.fromkeys(draws.choice(sets), 1.0))
                async with holding(service.serve, wanted, param="adapters") as serving:
                    assert serving.model in vllm.names
                    assert serving.model in vllm.staging._merges
                    await asyncio.sleep(draws.random() * 0.002)
                    assert serving.model in vllm.names
                    assert serving.model in vllm.staging._merges

        async def drops(asking: asyncio.Future[Any]):
            while not asking.done():
                for merge in list(service.merged.cache):
                    try:
                        await service.drop(merge)
                        refused["dropped"] += 1
                    except InUseError:
                        refused["in use"] += 1
                    except UnknownAdapterError:
                        refused["unknown"] += 1
                await asyncio.sleep(0.001)

        asking = asyncio.gather(*(asks() for _ in range(4)))
        await asyncio.gather(asking, drops(asking), drops(asking))
        assert refused["dropped"] > 5
        assert refused["in use"] > 5
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


def test_a_background_response_keeps_merge_and_slot_until_its_task_ends(start):
    async def scenario():
        service, vllm = start()
        tasks: dict[str, asyncio.Task[None]] = {}
        vllm.state.openai_serving_responses = SimpleNamespace(background_tasks=tasks)
        service._engine = Engine(vllm, vllm.state)
        ends = asyncio.Event()
        tasks["resp_1"] = asyncio.create_task(ends.wait())
        with ExitStack() as stack:
            serving = await service.serve(PAIR, stack, param="adapters")
            service.keep_for_background("resp_1", stack.pop_all())
        assert service.merged.cache.in_use(serving.model)
        assert serving.model in service.slots._admitted
        ends.set()
        await tasks["resp_1"]
        await asyncio.sleep(0)
        assert not service.merged.cache.in_use(serving.model)
        assert serving.model not in service.slots._admitted
        with ExitStack() as stack:
            await service.serve(PAIR, stack, param="adapters")
            service.keep_for_background("resp_2", stack.pop_all())  # vLLM refused it
        assert not service.merged.cache.in_use(serving.model)

    asyncio.run(scenario())


def test_what_takes_too_long_is_a_504(start):
    gate = threading.Event()

    async def scenario():
        service, _ = start(check=lambda adapter: gate.wait(30), merge_timeout_s=0.05)
        interception = Interception(echo)
        interception.start(service, 1000, ())
        body = b'{"adapters": ["a", "b"]}'
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await interception(scope, receive, send)
        gate.set()
        error = json.loads(sent[1]["body"])["error"]
        assert sent[0]["status"] == error["code"] == 504
        assert "longer than 0.05 s" in error["message"]

    asyncio.run(scenario())
