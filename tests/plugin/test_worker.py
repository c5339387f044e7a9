"""Staging: a merge is made by a thread, once, and lives as long as somebody holds it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lego_core import (
    IncompatibleAdaptersError,
    LoraAdapter,
    LoraModule,
    MergeConfig,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from vllm_lego.recipe import Member, Recipe
from vllm_lego.worker import StagingArea

CONFIG = MergeConfig(rank=2)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    draws = torch.Generator().manual_seed(0)
    for name in "ab":
        modules = {
            f"layer.{i}": LoraModule(
                torch.randn(2, 6, generator=draws), torch.randn(4, 2, generator=draws)
            )
            for i in range(3)
        }
        save_adapter(LoraAdapter(name, modules), tmp_path / name)
    return {name: tmp_path / name for name in "ab"}


def recipe_of(folders: dict[str, Path], identity: str = "lego-0000000000000001") -> Recipe:
    members = tuple(
        Member(name, str(folder), load_adapter(folder).digest, 1.0)
        for name, folder in folders.items()
    )
    return Recipe(identity, members, CONFIG)


def area(check: Any = lambda adapter: None) -> StagingArea:
    return StagingArea(torch.device("cpu"), torch.float32, check)


def finished(staging: StagingArea, recipe: Recipe, holder: str = "h") -> dict[str, Any]:
    limit = time.monotonic() + 30
    while (status := staging.stage(recipe, holder))["state"] == "pending":
        assert time.monotonic() < limit
        time.sleep(0.001)
    return status


def test_a_staged_merge_is_the_librarys(folders):
    staging, recipe = area(), recipe_of(folders)
    status = finished(staging, recipe)
    assert status["state"] == "ready"
    assert set(status["seconds"]) == {"queue", "load", "merge"}
    expected = merge_adapters([load_adapter(f) for f in folders.values()], CONFIG)
    taken = staging.take(recipe)
    assert status["nbytes"] == expected.nbytes == taken.nbytes
    for name, module in expected.modules.items():
        assert torch.equal(taken.modules[name].lora_a, module.lora_a)
        assert torch.equal(taken.modules[name].lora_b, module.lora_b)


def test_staging_never_waits_and_merges_once(folders):
    gate, checked = threading.Event(), []

    def check(adapter: LoraAdapter) -> None:
        checked.append(adapter.name)
        assert gate.wait(30)

    staging, recipe = area(check), recipe_of(folders)
    assert staging.stage(recipe, "one") == {"state": "pending"}
    assert staging.stage(recipe, "two") == {"state": "pending"}
    gate.set()
    assert finished(staging, recipe)["state"] == "ready"
    assert checked == ["a", "b"]


def test_it_lives_as_long_as_somebody_holds_it(folders):
    staging, recipe = area(), recipe_of(folders)
    finished(staging, recipe, "one")
    first = staging.take(recipe)
    staging.stage(recipe, "two")
    assert not staging.discard(recipe.merge_id, "one")
    assert staging.take(recipe) is first
    assert staging.discard(recipe.merge_id, "two")
    assert not staging.discard(recipe.merge_id, "two")
    assert staging.take(recipe) is not first


def test_a_member_that_changed_is_refused(folders):
    recipe = recipe_of(folders)
    other = load_adapter(folders["a"])
    save_adapter(LoraAdapter("b", {k: other.modules[k] for k in ["layer.0"]}), folders["b"])
    status = finished(area(), recipe)
    assert (status["state"], status["error"]) == ("failed", "AdapterChangedError")
    assert "'b' changed on disk" in status["message"]


def test_a_failure_is_told_to_each_holder_and_then_forgotten(folders):
    def check(adapter: LoraAdapter) -> None:
        raise IncompatibleAdaptersError(f"adapter {adapter.name!r} does not fit")

    staging, recipe = area(check), recipe_of(folders)
    staging.stage(recipe, "one")
    for holder in ("two", "one"):
        status = finished(staging, recipe, holder)
        assert status["error"] == "IncompatibleAdaptersError"
        assert status["message"] == "adapter 'a' does not fit"
    assert staging.stage(recipe, "one") == {"state": "pending"}


def test_what_is_no_lego_error_keeps_its_secrets(folders):
    def check(adapter: LoraAdapter) -> None:
        raise RuntimeError(f"/secret/path/{adapter.name}")

    status = finished(area(check), recipe_of(folders))
    assert (status["error"], status["message"]) == ("RuntimeError", "")


def test_two_merges_of_one_engine_id_never_meet(folders):
    staging = area()
    finished(staging, recipe_of(folders, "lego-0000000000000001"))
    status = staging.stage(recipe_of(folders, "lego-4000000000000001"), "h")
    assert (status["state"], status["error"]) == ("failed", "CollisionError")
