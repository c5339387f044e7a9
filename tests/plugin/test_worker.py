"""Staging: a merge is made by a thread, once, and lives as long as somebody holds it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from lego_core.adapter_config import CONFIG_FILE
from vllm_lego import worker
from vllm_lego.identity import engine_id
from vllm_lego.packed import PackedAdapter
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings
from vllm_lego.tiers import READERS
from vllm_lego.worker import StagingArea

CONFIG = MergeConfig(rank=2)
PENDING = {"state": "pending"}


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


def area(check: Any = lambda adapter: None, workers: int = 1, **settings: Any) -> StagingArea:
    settings = {"host_cache_bytes": 0} | settings
    return StagingArea(
        torch.device("cpu"),
        torch.float32,
        check,
        lambda adapter, _: adapter,
        Settings(**settings),
        workers=workers,
    )


def stage(staging: StagingArea, recipe: Recipe, holder: str) -> dict[str, Any]:
    return staging.stage([recipe], holder)["merges"][recipe.merge_id]


def buffer_of(adapter: LoraAdapter) -> int:
    return adapter.modules["layer.0"].lora_a.untyped_storage().data_ptr()


def finished(staging: StagingArea, recipe: Recipe, holder: str = "h") -> dict[str, Any]:
    limit = time.monotonic() + 120  # the threads yield to all else
    while (status := stage(staging, recipe, holder))["state"] == "pending":
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
    assert stage(staging, recipe, "one") == PENDING
    assert stage(staging, recipe, "two") == PENDING
    gate.set()
    assert finished(staging, recipe)["state"] == "ready"
    assert sorted(checked) == ["a", "b"]


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_threads_that_read_and_merge_have_no_helpers(folders):
    helped = []
    staging = area(lambda _: helped.append((threading.get_ident(), torch.get_num_threads())))
    assert finished(staging, recipe_of(folders))["state"] == "ready"
    assert [count for _, count in helped] == [1, 1]
    assert threading.get_ident() not in {thread for thread, _ in helped}
    assert torch.get_num_threads() == 2  # the engine's thread keeps its own


def test_one_given_up_in_the_middle_is_joined_by_whoever_asks_again(folders):
    gate, checked = threading.Event(), []

    def check(adapter: LoraAdapter) -> None:
        checked.append(adapter.name)
        assert gate.wait(30)

    staging, recipe = area(check), recipe_of(folders)
    stage(staging, recipe, "one")
    while not checked:
        time.sleep(0.001)
    assert staging.discard(recipe.merge_id, "one")
    assert stage(staging, recipe, "two") == PENDING
    gate.set()
    assert finished(staging, recipe, "two")["state"] == "ready"
    assert sorted(checked) == ["a", "b"]  # not a thread more


def test_it_lives_as_long_as_somebody_holds_it(folders):
    staging, recipe = area(), recipe_of(folders)
    finished(staging, recipe, "one")
    first = buffer_of(staging.take(recipe))
    stage(staging, recipe, "two")
    assert not staging.discard(recipe.merge_id, "one")
    assert buffer_of(staging.take(recipe)) == first
    kept = staging._merges[recipe.merge_id].future.result()  # so that its memory is not reused
    assert staging.discard(recipe.merge_id, "two")
    assert not staging.discard(recipe.merge_id, "two")
    assert buffer_of(staging.take(recipe)) != kept.packed.buffer.data_ptr() == first


def test_a_member_that_changed_is_refused(folders):
    recipe = recipe_of(folders)
    other = load_adapter(folders["a"])
    save_adapter(
        LoraAdapter("b", {k: other.modules[k] for k in ["layer.0"]}), folders["b"], overwrite=True
    )
    status = finished(area(), recipe)
    assert (status["state"], status["error"]) == ("failed", "AdapterChangedError")
    assert "'b' changed on disk" in status["message"]


def test_a_failure_is_told_to_each_holder_and_then_forgotten(folders):
    def check(adapter: LoraAdapter) -> None:
        raise IncompatibleAdaptersError(f"adapter {adapter.name!r} does not fit")

    staging, recipe = area(check), recipe_of(folders)
    stage(staging, recipe, "one")
    for holder in ("two", "one"):
        status = finished(staging, recipe, holder)
        assert status["error"] == "IncompatibleAdaptersError"
        assert status["message"] == "adapter 'a' does not fit"
    assert stage(staging, recipe, "one") == PENDING


def test_what_is_no_lego_error_keeps_its_secrets(folders):
    def check(adapter: LoraAdapter) -> None:
        raise RuntimeError(f"/secret/path/{adapter.name}")

    status = finished(area(check), recipe_of(folders))
    assert (status["error"], status["message"]) == ("RuntimeError", "")


def test_two_merges_of_one_engine_id_never_meet(folders):
    staging = area()
    finished(staging, recipe_of(folders, "lego-0000000000000001"))
    status = stage(staging, recipe_of(folders, "lego-4000000000000001"), "h")
    assert (status["state"], status["error"]) == ("failed", "CollisionError")


def test_what_left_the_device_comes_back_from_host_memory(folders):
    staging, recipe = area(host_cache_bytes=1 << 20), recipe_of(folders)
    assert finished(staging, recipe)["tier"] == "merge"
    first = staging.take(recipe)
    while staging.stage([], "h")["busy"]:  # until it is kept
        time.sleep(0.001)
    staging.discard(recipe.merge_id, "h")
    for folder in folders.values():
        shutil.rmtree(folder)
    assert finished(staging, recipe)["tier"] == "host"
    again = staging.take(recipe)
    for name, module in first.modules.items():
        assert torch.equal(again.modules[name].lora_b, module.lora_b)


@pytest.fixture
def _patient(monkeypatch):
    """On a slow machine, too, what is registered at once is so in time."""
    monkeypatch.setattr(worker, "_TAKEN_WITHIN_S", 60.0)


@pytest.mark.usefixtures("_patient")
def test_a_merge_is_kept_once_it_has_been_registered(folders, monkeypatch):
    staging, recipe = area(host_cache_bytes=1 << 20), recipe_of(folders)
    keep, taken = staging.tiers.keep, []

    def noted(*args: Any) -> None:
        taken.append(staging._merges[recipe.merge_id].future.result().taken.is_set())
        keep(*args)

    monkeypatch.setattr(staging.tiers, "keep", noted)
    assert finished(staging, recipe)["tier"] == "merge"
    staging.take(recipe)
    staging._threads.shutdown()
    assert taken == [True]
    assert len(staging.tiers.in_host_memory()) == 1


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize("at_once", [True, False])
def test_merges_that_wait_for_a_thread_wait_for_nobody_to_be_registered(folders, at_once):
    staging = area(host_cache_bytes=1 << 20, merge_threads=1)
    recipes = [recipe_of(folders, f"lego-{i:016x}") for i in (1, 2)]
    if at_once:
        staging.stage(recipes, "h")
    started = time.monotonic()
    assert [finished(staging, recipe)["state"] for recipe in recipes] == ["ready", "ready"]
    assert time.monotonic() - started < 60
    staging.take(recipes[1])
    staging._threads.shutdown()


@pytest.mark.usefixtures("_patient")
def test_what_is_let_go_of_before_it_is_kept_is_still_there(folders):
    staging, recipe = area(host_cache_bytes=1 << 20), recipe_of(folders)
    assert finished(staging, recipe)["tier"] == "merge"
    first = staging._merges[recipe.merge_id].future.result().packed.unpack()
    assert staging.discard(recipe.merge_id, "h")
    for folder in folders.values():
        shutil.rmtree(folder)
    status = stage(staging, recipe, "h")
    assert (status["state"], status["tier"]) == ("ready", "host")
    again = staging.take(recipe)  # which is what the thread waits for
    for name, module in first.modules.items():
        assert torch.equal(again.modules[name].lora_a, module.lora_a)
    staging._threads.shutdown()
    assert len(staging.tiers.in_host_memory()) == 1


def test_a_new_set_of_known_members_needs_no_disk(folders):
    checked = []
    staging = area(lambda adapter: checked.append(adapter.name), host_cache_bytes=1 << 20)
    finished(staging, recipe_of(folders))
    another = recipe_of(folders, "lego-0000000000000002")
    another = replace(another, members=tuple(replace(m, weight=2.0) for m in another.members))
    for folder in folders.values():
        shutil.rmtree(folder)
    assert finished(staging, another)["tier"] == "merge"
    assert sorted(checked) == ["a", "b"]


def test_host_memory_is_bounded_and_drops_the_least_recently_used(folders):
    recipes = [recipe_of(folders, f"lego-{i:016x}") for i in range(1, 9)]
    members = [PackedAdapter.pack(load_adapter(folder)).nbytes for folder in folders.values()]
    probe = area()
    size = finished(probe, recipes[0])["nbytes"]
    staging = area(host_cache_bytes=sum(members) + 3 * size, merge_threads=1)
    told = []
    for recipe in recipes:
        while (answer := staging.stage([recipe], "h"))["merges"][recipe.merge_id] == PENDING:
            told += answer["events"]
        told += answer["events"]
        staging.discard(recipe.merge_id, "h")
    staging._threads.shutdown()
    kept = [Recipe.decode(merge.recipe).merge_id for merge in staging.tiers.in_host_memory()]
    assert sorted(kept) == [recipe.merge_id for recipe in recipes[-3:]]
    answer = staging.stage([], "h")
    assert answer["tiers"] == {"host": (3, 3 * size), "disk": (0, 0)}
    told += answer["events"]
    assert [event[:2] for event in told] == [("evictions", "host")] * 5
    assert all(0 < unused_s < 60 for *_, unused_s in told)
    assert staging.stage([], "h")["events"] == []


def test_a_member_of_several_new_sets_is_read_once(folders):
    checked = []
    staging = area(lambda adapter: checked.append(adapter.name), host_cache_bytes=1 << 20)
    recipes = [recipe_of(folders, f"lego-{i:016x}") for i in (1, 2, 3)]
    for recipe in recipes:
        stage(staging, recipe, "h")
    assert {finished(staging, recipe)["state"] for recipe in recipes} == {"ready"}
    assert sorted(checked) == ["a", "b"]


def test_readers_that_hang_hold_up_no_other_set(folders, tmp_path):
    hangs, begun = threading.Event(), threading.Semaphore(0)

    def check(adapter: LoraAdapter) -> None:
        if adapter.name.startswith("slow"):
            begun.release()
            hangs.wait(120)

    slow = {f"slow{i}": tmp_path / f"slow{i}" for i in range(8)}
    for folder in slow.values():
        shutil.copytree(folders["a"], folder)
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["revision"] = folder.name  # another content, or all were one
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    staging = area(check)
    stage(staging, recipe_of(slow), "h")
    for _ in range(READERS + 1):  # and the thread of that set
        assert begun.acquire(timeout=60)
    assert finished(staging, recipe_of(folders, "lego-0000000000000002"))["state"] == "ready"
    hangs.set()


def test_what_vllm_was_given_is_not_given_again(folders):
    """It changes what it is given."""
    staging = StagingArea(
        torch.device("cpu"),
        torch.float32,
        lambda _: None,
        lambda adapter, number: SimpleNamespace(adapter=adapter, number=number),
        Settings(host_cache_bytes=0),
    )
    recipe = recipe_of(folders)
    finished(staging, recipe)
    first, second = staging.take(recipe), staging.take(recipe)
    assert first is not second
    assert first.adapter.modules.keys() == second.adapter.modules.keys()
    assert first.number == second.number == engine_id(recipe.merge_id)


def test_the_members_of_a_set_are_read_at_the_same_time(folders):
    together = threading.Barrier(2)  # opens only when two are there at once
    staging = area(lambda _: together.wait(120) and None)
    assert finished(staging, recipe_of(folders))["state"] == "ready"


def test_several_threads_make_several_merges_at_a_time(folders):
    together = threading.Barrier(2)  # opens only when two are there at once
    staging = area(lambda _: together.wait(120) and None)
    recipes = [recipe_of({n: f}, f"lego-{i:016x}") for i, (n, f) in enumerate(folders.items(), 1)]
    for recipe in recipes:
        assert stage(staging, recipe, "h") == PENDING
    assert [finished(staging, recipe)["state"] for recipe in recipes] == ["ready", "ready"]


def test_workers_of_one_engine_have_one_fingerprint_of_a_merge_and_another_of_another(folders):
    prints = [
        finished(area(workers=2), recipe)["fingerprint"]
        for recipe in (recipe_of(folders), recipe_of(folders), recipe_of({"a": folders["a"]}))
    ]
    assert prints[0] == prints[1] != prints[2]
    assert all(len(fingerprint) == 16 for fingerprint in prints)


def test_a_thread_that_dies_of_a_merge_is_replaced(folders):
    """Even what is no Exception ends one merge, not the staging."""

    def check(adapter: LoraAdapter) -> None:
        raise SystemExit(adapter.name)

    staging = area(check, merge_threads=1)
    assert finished(staging, recipe_of(folders))["error"] == "SystemExit"
    staging.tiers._check = lambda adapter: None
    assert finished(staging, recipe_of(folders))["state"] == "ready"


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from lego_core import LoraAdapter, LoraModule, save_adapter
from tests.plugin.test_worker import area, finished, recipe_of
torch.set_num_threads(1)
folders = {}
for name in "ab":
    module = LoraModule(torch.randn(256, 30_000), torch.randn(30_000, 256))
    save_adapter(LoraAdapter(name, {"layer": module}), Path(sys.argv[1]) / name)
    folders[name] = Path(sys.argv[1]) / name
recipe, staging = recipe_of(folders), area(merge_threads=1)
finished(staging, recipe_of({"a": folders["a"]}, "lego-0000000000000002"))  # all that grows once
pages = int(Path("/proc/self/statm").read_text().split()[0])
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), before[1]))
print(finished(staging, recipe)["error"])
resource.setrlimit(resource.RLIMIT_AS, before)
print(finished(staging, recipe)["state"])
"""


def test_merge_out_of_memory(tmp_path):
    """The process gets no more memory than it has; then it does."""
    ran = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["OutOfMemoryError", "ready"], ran.stderr
