"""What the orchestrator answers, and what it leaves behind. vLLM is played."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import threading
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.plugin.played_vllm import NAMES, PlayedVllm, holding, nothing_left, room_for_one, use
from vllm_lego._vllm import Engine
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import (
    MergeFailedError,
    ServingError,
    UnknownAdapterError,
    UnmergeableError,
    WorkersDisagreeError,
)
from vllm_lego.file_stamps import look, stamp
from vllm_lego.identity import engine_id
from vllm_lego.looks import SHARED_S
from vllm_lego.recipe import Recipe
from vllm_lego.service import Serving
from vllm_lego.settings import Settings


def test_miss_then_hit_and_any_order(start):
    async def scenario():
        service, vllm = start()
        first, second = await use(service, "ab"), await use(service, "ba")
        assert (first.result, second.result) == ("miss", "hit")
        assert first.model == second.model
        assert vllm.registered == {engine_id(first.model): first.model}
        assert nothing_left(service, vllm)

    asyncio.run(scenario())


@pytest.mark.usefixtures("stamped_at_once")
def test_workers_are_told_what_the_files_looked_like(start):
    async def scenario():
        service, _ = start()
        merge = (await use(service, "ab")).model
        [recipe] = [Recipe.decode(merge.recipe) for _, merge in await service.merges()]
        assert recipe.merge_id == merge
        for member in recipe.members:
            assert member.stamp == stamp(look(member.path).mark) != ""

    asyncio.run(scenario())


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
            async with holding(service.serve_known, identity) as serving:
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
        async with holding(service.serve_known, "lego-0123456789abcdef") as serving:
            assert serving is None
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


def test_an_id_whose_members_are_gone_and_that_no_tier_has_is_unknown(start, folder):
    size = room_for_one(start)

    async def scenario():
        service, vllm = start(device_cache_bytes=size, host_cache_bytes=0)
        first = (await use(service, "ab")).model
        await use(service, "ac")
        async with asyncio.timeout(10):
            while vllm.staging.stage([], "test")["busy"]:  # until no thread has it any more
                await asyncio.sleep(0.001)
        (folder / "b" / "adapter_model.safetensors").write_bytes(b"other")
        with pytest.raises(UnknownAdapterError, match=first):
            async with holding(service.serve_known, first):
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
        async with holding(service.serve_known, first.model) as serving:
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
                async with holding(service.serve, wanted, param="adapters"):
                    pass
            assert caught.value.status == 400
            assert caught.value.param == f"merge.{next(iter(fields))}"

    asyncio.run(scenario())


def test_api_servers_share_the_budget_and_the_slots(folder):
    shared = PlayedVllm(folder, lambda adapter: None, Settings(), _api_process_count=2)
    engine = Engine(shared, shared.state)
    assert (engine.api_servers, engine.slots) == (2, 4)
