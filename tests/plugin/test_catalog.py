"""What can be named is what the operator named; files are read again when they change, not else."""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lego_core import LoraAdapter, LoraModule, save_adapter
from lego_core.adapter_files import INDEX_FILE, WEIGHTS_FILE
from vllm_lego import catalog, file_stamps
from vllm_lego.access import Access
from vllm_lego.catalog import Catalog, CatalogEntry
from vllm_lego.errors import ForbiddenError, UnknownAdapterError, UnmergeableError
from vllm_lego.file_stamps import FilesRead, look, stamp
from vllm_lego.looks import SHARED_S
from vllm_lego.policy import Policy
from vllm_lego.sources import AdapterFolder


def saved(folder: Path, value: float = 1.0) -> Path:
    modules = {
        f"layer.{i}": LoraModule(torch.full((2, 6), value), torch.ones(4, 2)) for i in range(2)
    }
    save_adapter(LoraAdapter("a", modules), folder, overwrite=True)
    return folder


def sharded(folder: Path) -> Path:
    """Split an adapter's weights into a file per tensor and an index."""
    tensors = load_file(folder / WEIGHTS_FILE)
    places = {key: f"adapter_model-{i}.safetensors" for i, key in enumerate(sorted(tensors))}
    for key, file in places.items():
        save_file({key: tensors[key]}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    (folder / WEIGHTS_FILE).unlink()
    return folder


def looked_up(adapters: Catalog, name: str) -> CatalogEntry:
    (entry,) = asyncio.run(adapters.look_up([name], param="adapters"))
    return entry


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters whose files were read. None settles meanwhile."""
    monkeypatch.setattr(file_stamps, "SETTLED_NS", 10**15)
    names = []
    describe = catalog.describe_adapter

    def noted(source: Any, *, name: str, **how: Any) -> Any:
        names.append(name)
        return describe(source, name=name, **how)

    monkeypatch.setattr(catalog, "describe_adapter", noted)
    return names


@pytest.mark.parametrize("layout", [lambda folder: folder, sharded])
def test_files_are_read_once_and_again_when_one_of_them_changes(tmp_path, read, layout):
    folder = layout(saved(tmp_path / "a"))
    adapters = Catalog({"a": str(folder)})
    first = looked_up(adapters, "a")
    assert looked_up(adapters, "a") == first
    assert read == ["a"]
    weights = max(folder.glob("*.safetensors"))
    tensors = {key: tensor * 2 for key, tensor in load_file(weights).items()}
    replacement = tmp_path / "replacement"
    save_file(tensors, replacement)
    replacement.replace(weights)
    time.sleep(SHARED_S)  # requests may share a look for so long
    assert looked_up(adapters, "a").digest != first.digest
    assert read == ["a", "a"]


@pytest.mark.usefixtures("stamped_at_once")
def test_what_was_written_just_now_is_read_once_more_when_it_has_settled(
    tmp_path, read, monkeypatch
):
    monkeypatch.setattr("vllm_lego.looks.SHARED_S", 0.0)
    adapters = Catalog({"a": str(saved(tmp_path / "a"))})
    found = []
    for settled_ns in (10**15, 0):
        monkeypatch.setattr(file_stamps, "SETTLED_NS", settled_ns)
        found.append([looked_up(adapters, "a") for _ in range(2)])
    assert read == ["a", "a"]
    (young, _), (settled, _) = found
    assert young.stamp == ""
    assert settled.stamp == stamp(look(young.path).mark)
    assert young.digest == settled.digest


@pytest.mark.usefixtures("stamped_at_once")
@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_leads_elsewhere_while_it_is_read_is_read_again(
    tmp_path, monkeypatch, at_once
):
    """Afterwards it looks as it did before, at once or by the next request."""
    monkeypatch.setattr("vllm_lego.looks.SHARED_S", 0.0)
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second", 2.0)

    def lead_to(folder: Path) -> None:
        (tmp_path / "new").symlink_to(folder)
        (tmp_path / "new").replace(tmp_path / "a")

    describe = catalog.describe_adapter

    def overtaken(*source: Any, **how: Any) -> Any:
        lead_to(second)
        found = describe(*source, **how)
        if at_once:
            lead_to(first)
        return found

    lead_to(first)
    monkeypatch.setattr(catalog, "describe_adapter", overtaken)
    adapters = Catalog({"a": str(tmp_path / "a")})
    wrong = looked_up(adapters, "a")
    assert wrong.digest == describe(second)[1]
    assert wrong.stamp == "", "no worker takes it for what is there"
    lead_to(first)
    monkeypatch.setattr(catalog, "describe_adapter", describe)
    right = looked_up(adapters, "a")
    assert right.digest == describe(first)[1]
    assert right.stamp


def test_elsewhere_files_that_look_different_when_they_are_open_are_read_once(
    tmp_path, read, monkeypatch
):
    """As with blobfuse: the time of the content is that of a copy, as long as it is open."""
    monkeypatch.setattr("vllm_lego.looks.SHARED_S", 0.0)
    monkeypatch.setattr(file_stamps, "local_devices", frozenset)
    monkeypatch.setattr(FilesRead, "are", lambda *_: False)
    adapters = Catalog({"a": str(saved(tmp_path / "a"))})
    assert looked_up(adapters, "a") == looked_up(adapters, "a")
    assert read == ["a"]


def test_a_file_that_took_the_place_of_shards_is_noticed(tmp_path):
    folder = sharded(saved(tmp_path / "a"))
    adapters = Catalog({"a": str(folder)})
    first = looked_up(adapters, "a")
    saved(tmp_path / "b", 2.0)
    (tmp_path / "b" / WEIGHTS_FILE).rename(folder / WEIGHTS_FILE)
    time.sleep(SHARED_S)
    assert looked_up(adapters, "a").digest != first.digest


def test_who_asks_soon_after_another_shares_its_look(tmp_path, monkeypatch):
    looks = []
    see = catalog.look
    monkeypatch.setattr("vllm_lego.looks.SHARED_S", 1000.0)
    monkeypatch.setattr(catalog, "look", lambda path: (looks.append(path), see(path))[1])
    adapters = Catalog({name: str(saved(tmp_path / name)) for name in "ab"})

    async def scenario():
        both = [adapters.look_up("ab", param="adapters") for _ in range(64)]
        found = await asyncio.gather(*both)
        found.append(await adapters.look_up("ab", param="adapters"))
        assert all(entries == found[0] for entries in found)

    asyncio.run(scenario())
    assert sorted(looks) == sorted(str(tmp_path / name) for name in "ab")


def test_files_of_what_the_caller_may_not_name_are_not_looked_at(tmp_path, monkeypatch):
    looks = []
    see = catalog.look
    monkeypatch.setattr(catalog, "look", lambda path: (looks.append(path), see(path))[1])
    access = Access(Policy.from_toml('[[allow]]\nadapters = ["a"]'))
    served = {name: str(saved(tmp_path / name)) for name in "ab"}
    adapters = Catalog(served, access=access)
    with access.of([]), pytest.raises(UnknownAdapterError, match="'b'"):
        asyncio.run(adapters.look_up(["b"], param="adapters"))
    assert looks == []
    with access.of([]):
        assert looked_up(adapters, "a").path == served["a"]
    assert looks == [served["a"]]


@pytest.mark.parametrize(
    ("names", "error"), [(("a", "c"), UnknownAdapterError), (("a", "b"), ForbiddenError)]
)
def test_what_is_refused_by_its_names_waits_for_no_file(tmp_path, monkeypatch, names, error):
    monkeypatch.setattr(catalog, "look", lambda _: pytest.fail("looked"))
    access = Access(Policy.from_toml('[[allow]]\nadapters = ["a"]\n[[allow]]\nadapters = ["b"]'))
    served = {name: str(saved(tmp_path / name)) for name in "ab"}
    with access.of([]), pytest.raises(error):
        asyncio.run(Catalog(served, access=access).look_up(names, param="adapters"))


def test_a_folder_that_another_request_finds_changed_meanwhile_is_looked_at_anew(
    tmp_path, monkeypatch
):
    for version in (1.0, 2.0):
        saved(tmp_path / f".v{version:.0f}", version)
    (tmp_path / "a").symlink_to(".v1")
    folder, see, looked = AdapterFolder(tmp_path), catalog.look, []
    one_thread = ThreadPoolExecutor(1)  # so that it sees the folder after the adapter

    def overtaken(path: str) -> Any:
        if not looked:  # as if the other's look ended just now
            (tmp_path / "new").symlink_to(".v2")
            (tmp_path / "new").replace(tmp_path / "a")
            os.utime(tmp_path, (1, 1))  # or any look would take it for changed just now
            asyncio.run(folder.refresh())
        looked.append(path)
        return see(path)

    monkeypatch.setattr(catalog, "look", overtaken)
    found = looked_up(Catalog({}, folder, files=one_thread), "a")
    assert found.path == str(tmp_path / ".v2")
    assert looked == [str(tmp_path / ".v1"), str(tmp_path / ".v2")]


def test_what_could_be_a_hub_repository_is_a_folder_all_the_same(tmp_path, monkeypatch):
    """The plugin fetches nothing, whatever the operator's path looks like."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lego_core.hub.hf_hub_download", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(UnmergeableError, match=r"adapter 'a' has no adapter_config\.json"):
        looked_up(Catalog({"a": "org/name"}), "a")


def test_what_nobody_named_is_unknown(tmp_path):
    saved(tmp_path / "a")
    with pytest.raises(UnknownAdapterError, match="'b' is not served here"):
        looked_up(Catalog({"a": str(tmp_path / "a")}), "b")
