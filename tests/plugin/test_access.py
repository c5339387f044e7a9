"""Adapters that vLLM does not know, and the policy, through the service and the interception.

vLLM is played.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from lego_core import LoraAdapter, LoraModule, MergeConfig, load_adapter, save_adapter
from tests.hub_server import REPO, Hub
from tests.plugin.played_vllm import PlayedVllm, holding
from tests.plugin.test_interception import echo
from vllm_lego._vllm import Engine
from vllm_lego.access import Access, Callers
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import (
    BadRequestError,
    ForbiddenError,
    MergeTimeoutError,
    UnknownAdapterError,
    UnmergeableError,
)
from vllm_lego.interception import Interception
from vllm_lego.looks import SHARED_S
from vllm_lego.metrics import Metrics
from vllm_lego.policy import Policy
from vllm_lego.recipe import Recipe
from vllm_lego.service import LegoService, Serving
from vllm_lego.settings import Settings, SettingsError

KEYS = ("one", "two")


def write(folder: Path, seed: int, rank: int = 2) -> None:
    draws = torch.Generator().manual_seed(seed)
    modules = {
        f"layer.{i}": LoraModule(
            torch.randn(rank, 6, generator=draws), torch.randn(4, rank, generator=draws), 0.7
        )
        for i in range(2)
    }
    save_adapter(LoraAdapter(folder.name, modules), folder, overwrite=True)


@pytest.fixture
def start(tmp_path: Path):
    """Start a service with the adapters a to f of vLLM's own, and x to z of the folder."""
    for seed, name in enumerate("abcdef"):
        write(tmp_path / "native" / name, seed)
    for seed, name in enumerate("xyz"):
        write(tmp_path / "folder" / name, 10 + seed)
    metrics = Metrics()

    def started(policy: str | None = None, **settings: Any) -> tuple[LegoService, PlayedVllm]:
        chosen = Settings(adapter_dir=str(tmp_path / "folder"), **settings)
        vllm = PlayedVllm(tmp_path / "native", lambda _: None, chosen)
        access = Access(Policy.from_toml(policy) if policy else None, KEYS)
        return LegoService(Engine(vllm, vllm.state), chosen, metrics, access), vllm

    yield started
    for collector in vars(metrics).values():
        REGISTRY.unregister(collector)


async def use(service: LegoService, *names: str, **merge: Any) -> Serving:
    wanted = AdapterSet(dict.fromkeys(sorted(names), 1.0), merge)
    async with holding(service.serve, wanted, param="adapters") as serving:
        return serving


def test_one_adapter_of_the_folder_is_served_exactly(start, tmp_path):
    async def scenario():
        service, vllm = start()
        serving = await use(service, "x")
        assert serving.result == "miss"
        assert await use(service, "x") == Serving(serving.model, "hit")
        (merge,) = service.merged.cache.snapshot().values()
        recipe = Recipe.decode(merge.recipe)
        assert recipe.config == MergeConfig(method="concat", rank=2)
        merged = vllm.staging.take(recipe)
        for name, module in load_adapter(tmp_path / "folder" / "x").modules.items():
            assert torch.allclose(merged.modules[name].delta(), module.delta(), atol=1e-6)
        assert await use(service, "a") == Serving("a", None)  # vLLM's own stays vLLM's

    asyncio.run(scenario())


def test_sets_mix_where_adapters_come_from_and_follow_the_folder(start, tmp_path):
    async def scenario():
        service, _ = start()
        first = await use(service, "a", "x")
        write(tmp_path / "folder" / "x", 99)
        await asyncio.sleep(SHARED_S)  # requests may share a look for so long
        second = await use(service, "a", "x")
        assert first.model != second.model
        write(tmp_path / "folder" / "new", 50)
        assert (await use(service, "new", "x")).result == "miss"
        with pytest.raises(UnknownAdapterError):
            await use(service, "none", "x")

    asyncio.run(scenario())


def test_a_rank_above_the_engines_is_said(start, tmp_path):
    async def scenario():
        service, _ = start()
        write(tmp_path / "folder" / "wide", 1, rank=16)
        with pytest.raises(
            UnmergeableError, match="'wide' has rank 16; this server takes at most 8"
        ):
            await use(service, "wide")
        assert (await use(service, "wide", "x")).result == "miss"  # merged to a rank it takes

    asyncio.run(scenario())


def test_a_hub_that_keeps_a_request_waiting_is_a_timeout_for_it(start, hub: Hub):
    hub.gate.clear()

    async def scenario():
        service, _ = start(hub_allow="org/*", merge_timeout_s=0.1)
        with pytest.raises(MergeTimeoutError, match=r"longer than 0\.1 s"):
            await use(service, "a", REPO)
        assert await use(service, "a") == Serving("a", None)
        hub.gate.set()
        with pytest.raises((UnknownAdapterError, MergeTimeoutError)):
            await use(service, "a", "org/none")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("merge", "allowed"),
    [
        ({"method": "svd"}, True),
        ({"method": "lego-functions", "scale": "nearest"}, True),
        ({"method": "ties"}, False),
        ({"method": "dare_ties", "density": 0.3}, False),
        ({"method": "knots"}, False),
        ({"restarts": 16}, True),
        ({"restarts": 17}, False),
        ({"method": "lego-paper", "restarts": 64}, False),
    ],
)
def test_what_burns_the_device_is_refused_unless_the_operator_allows_it(start, merge, allowed):
    async def scenario():
        service, _ = start()
        if allowed:
            assert (await use(service, "a", "b", **merge)).result == "miss"
        else:
            with pytest.raises(BadRequestError, match="this server allows") as caught:
                await use(service, "a", "b", **merge)
            assert caught.value.param in ("merge.method", "merge.restarts")
        service, _ = start(
            methods="ties, dare_ties knots lego-paper lego-functions svd", max_restarts=64
        )
        assert (await use(service, "a", "b", **merge)).result in ("miss", "hit")

    asyncio.run(scenario())


def test_the_default_method_is_allowed_whatever_the_list_says(start):
    async def scenario():
        service, _ = start(method="ties", methods="svd")
        assert (await use(service, "a", "b")).result == "miss"
        assert (await use(service, "a", "b", method="ties", density=0.3)).result == "miss"
        with pytest.raises(BadRequestError, match="allows ties, svd"):
            await use(service, "a", "b", method="lego")
        with pytest.raises(SettingsError, match="VLLM_LEGO_METHODS lists 'best'"):
            start(methods="svd,best")

    asyncio.run(scenario())


async def post(app: Any, body: dict[str, Any], key: str | None = None) -> tuple[int, Any]:
    """Send a body. Returns the status and what vLLM, which echoes, or the refusal says."""
    headers = [(b"content-type", b"application/json")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def intercepting(service: LegoService, keys: tuple[str, ...] = ()) -> Callers:
    interception = Interception(echo)
    interception.start(service, 100_000, keys)
    callers = Callers(interception)
    callers.access = service.access
    return callers


def test_a_folders_adapter_as_model_is_served_and_found_at_once(start, tmp_path):
    async def scenario():
        service, _ = start()
        app = intercepting(service)
        for name in ("x", "new", "c++"):
            if name != "x":
                write(tmp_path / "folder" / name, 7)
                if "+" in name:
                    await service.catalog.refresh()
            status, body = await post(app, {"model": name, "prompt": "p"})
            assert status == 200
            assert body["model"].startswith("lego-")
            assert body["prompt"] == "p"
        status, body = await post(app, {"model": "x+a"})
        assert body["model"].startswith("lego-")
        for model in ("base", "a", "none", "", "lego-0123456789abcdef", "..", "x/", 7):
            assert await post(app, {"model": model}) == (200, {"model": model})  # vLLM's to answer

    asyncio.run(scenario())


def test_strangers_get_401_whatever_the_folder_holds(start):
    async def scenario():
        service, _ = start()
        app = intercepting(service, KEYS)
        answers = [await post(app, {"model": m}, "wrong") for m in ("x", "none", "x+none", "x+y")]
        assert answers == [(401, {"error": "Unauthorized"})] * 4

    asyncio.run(scenario())


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


POLICY = f"""
[[allow]]
adapters = ["a", "b", "x"]
keys = ["{digest("one")}"]
[[allow]]
adapters = ["c", "x"]
keys = ["{digest("one")}", "{digest("two")}"]
"""


def test_a_policy_decides_for_each_key(start):
    async def scenario():
        service, vllm = start(POLICY)
        app = intercepting(service, KEYS)

        async def asked(key: str, *names: str) -> tuple[int, Any]:
            return await post(app, {"adapters": list(names)}, key)

        status, body = await asked("one", "a", "x")
        merge = body["model"]
        assert status == 200
        assert (await asked("two", "c", "x"))[0] == 200
        unknown = {
            json.dumps(await asked("two", *names)).replace(repr(names[-1]), "?")
            for names in (("a",), ("none",), ("x", "none"), ("x", "b"), ("c", "y"), ("z",))
        }
        assert len(unknown) == 1
        assert '[404, {"error"' in unknown.pop()
        status, body = await asked("one", "a", "c")
        assert status == 403
        assert "'a', 'c'" in body["error"]["message"]
        # A merge's id is as good as its members' names, and no better.
        assert await post(app, {"model": merge}, "one") == (200, {"model": merge})
        assert await post(app, {"model": merge}, "two") == (
            200,
            {"model": merge},
        )  # vLLM: 404, see below
        with service.access.of([(b"authorization", b"Bearer two")]):
            assert merge not in vllm.state.openai_serving_models.lora_requests
            assert "a" not in vllm.state.openai_serving_models.lora_requests
            assert "c" in vllm.state.openai_serving_models.lora_requests
            listed = [Recipe.decode(m.recipe).merge_id for _, m in await service.merges()]
            assert merge not in listed
            assert len(listed) == 1
            assert service.catalog.names() == ["c", "x"]
        with service.access.of([(b"authorization", b"Bearer one")]):
            assert merge in vllm.state.openai_serving_models.lora_requests
            assert len(await service.merges()) == 2
        assert len(await service.merges()) == 2

    asyncio.run(scenario())


def test_an_id_of_what_may_not_be_combined_is_forbidden(start):
    async def scenario():
        service, _ = start(POLICY)
        merge = (await use(service, "a", "c")).model  # the server itself may
        app = intercepting(service, KEYS)
        status, body = await post(app, {"model": merge}, "one")
        assert status == 403
        assert body["error"]["param"] == "model"
        with (
            service.access.of([(b"authorization", b"Bearer one")]),
            pytest.raises(ForbiddenError),
        ):
            await use(service, "a", "c")

    asyncio.run(scenario())


def test_members_of_one_content_and_other_names_may_be_sent_back_by_who_named_them(start, tmp_path):
    async def scenario():
        service, vllm = start(POLICY)
        write(tmp_path / "native" / "c", 0)  # what a is
        app = intercepting(service, KEYS)
        _, first = await post(app, {"adapters": ["a", "x"]}, "one")
        _, second = await post(app, {"adapters": ["c", "x"]}, "two")
        assert first == second
        with service.access.of([(b"authorization", b"Bearer two")]):
            assert second["model"] in vllm.state.openai_serving_models.lora_requests
        assert await post(app, second, "two") == (200, second)

    asyncio.run(scenario())


def test_a_withdrawn_adapter_is_not_served_by_the_ids_of_its_merges(start, tmp_path):
    async def scenario():
        service, _ = start()
        known = (await use(service, "a", "x")).model
        async with holding(service.serve_known, known) as serving:
            assert serving is not None
        shutil.rmtree(tmp_path / "folder" / "x")
        async with holding(service.serve_known, known) as serving:
            assert serving is None

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["a", "nobody", "x"])
def test_without_a_key_no_name_but_the_bases_passes_on_open_routes(start, name):
    async def scenario():
        service, _ = start()
        app = intercepting(service, KEYS)
        assert await post(app, {"model": "base"}, "wrong") == (200, {"model": "base"})
        status, _ = await post(app, {"model": name}, "wrong")
        assert status == 401

    asyncio.run(scenario())


def test_what_is_hidden_takes_no_turn(start):
    """Waiting for a slot would tell that it exists."""

    async def scenario():
        service, _ = start(POLICY)
        with service.access.of([(b"authorization", b"Bearer two")]):
            async with holding(service.serve_native, "c"):
                pass
            async with holding(service.serve_native, "a"):
                pass
        app = intercepting(service, KEYS)
        held = [holding(service.serve_native, name) for name in "abcd"]
        for one in held:
            await one.__aenter__()
        assert await asyncio.wait_for(post(app, {"model": "b"}, "two"), 5) == (200, {"model": "b"})
        waiting = asyncio.create_task(post(app, {"model": "b"}, "one"))
        await asyncio.sleep(0.05)
        assert waiting.done()  # it has a slot already
        for one in held:
            await one.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_vllms_list_of_models_has_the_folders_adapters(start):
    async def scenario():
        service, vllm = start()

        class Card(SimpleNamespace):
            pass

        cards = [
            Card(id="base", root="/models/base", parent=None, permission=[SimpleNamespace()]),
            Card(id="lego-0123456789abcdef", root="lego://{}", parent="base", permission=[]),
        ]

        async def stock() -> Any:
            return SimpleNamespace(data=list(cards))

        vllm.state.openai_serving_models.show_available_models = stock
        engine = Engine(vllm, vllm.state)
        engine.list_too(service.catalog.names_to_list)
        listed = await vllm.state.openai_serving_models.show_available_models()
        assert [(card.id, card.root, card.parent) for card in listed.data] == [
            ("base", "/models/base", None),
            *((name, name, "base") for name in "xyz"),
        ]

    asyncio.run(scenario())
