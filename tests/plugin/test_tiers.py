"""What a worker keeps in one range of host memory: within the budget, and never under a reader."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lego_core import (
    AdapterChangedError,
    AdapterFormatError,
    IncompatibleAdaptersError,
    LegoError,
    LoraAdapter,
    LoraModule,
    MergeConfig,
    describe_adapter,
    load_adapter,
    save_adapter,
)
from lego_core.adapter_files import INDEX_FILE, WEIGHTS_FILE
from vllm_lego.file_stamps import look, stamp
from vllm_lego.host_memory import ALIGNMENT, HostMemory
from vllm_lego.packed import PackedAdapter
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings
from vllm_lego.tiers import Tiers

ENTRY = 2 * ALIGNMENT  # bytes of each adapter here

Make = Callable[..., Tiers]


def adapter(number: int, entries: int = 1) -> LoraAdapter:
    """An adapter of `entries` times `ENTRY` bytes, all of one value."""
    width = entries * ENTRY // 8
    module = LoraModule(
        torch.full((1, width), float(number)), torch.full((width, 1), float(number))
    )
    return LoraAdapter(f"{number}", {"layer": module})


def recipe(number: int) -> Recipe:
    members = (Member("a", "/a", "digest", 1.0),)
    return Recipe(f"lego-{number:016x}", members, MergeConfig(rank=1))


def keep(tiers: Tiers, number: int, entries: int = 1) -> None:
    tiers.keep(recipe(number), PackedAdapter.pack(adapter(number, entries)), 1.0)


def kept(tiers: Tiers) -> list[int]:
    merges = (Recipe.decode(merge.recipe).merge_id for merge in tiers.in_host_memory())
    return sorted(int(merge_id.removeprefix("lego-"), 16) for merge_id in merges)


def holds(found: LoraAdapter, number: int) -> bool:
    module = found.modules["layer"]
    return bool((module.lora_a == number).all() and (module.lora_b == number).all())


@pytest.fixture
def make() -> Make:
    """Tiers on the CPU that use one range of host memory all the same."""

    def tiers(entries: int, **settings: object) -> Tiers:
        budget = Settings(host_cache_bytes=entries * ENTRY, **settings)
        memory = HostMemory(budget.host_cache_bytes, pin=False)
        device = torch.device("cpu")
        return Tiers(device, lambda _: None, budget, memory, writes=True)

    return tiers


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    found = []
    for number in range(1, 7):
        save_adapter(adapter(number), folder := tmp_path / f"{number}")
        found.append(Member(f"{number}", str(folder), load_adapter(folder).digest, 1.0))
    return found


def test_what_is_kept_is_copied_into_that_memory(make):
    tiers = make(3)
    source = PackedAdapter.pack(adapter(1))
    tiers.keep(recipe(1), source, 0.5)
    source.buffer.zero_()
    packed, fidelity, tier = tiers.find(recipe(1))
    assert (fidelity, tier) == (0.5, "host")
    assert holds(packed.unpack(), 1)
    assert tiers.host_account() == (1, ENTRY)
    assert tiers._memory.free_ranges() == [(ENTRY, 3 * ENTRY)]


def lies_there(tiers: Tiers) -> list[bool]:
    """Whether what is read lies in that memory when it has been read, not kept yet."""
    found: list[bool] = []

    def check(adapter: LoraAdapter) -> None:
        found.extend(tiers._memory.holds(m.lora_a) for m in adapter.modules.values())

    tiers._check = check
    return found


def test_a_member_is_read_into_that_memory(make, members):
    tiers = make(3)
    found = lies_there(tiers)
    [read] = tiers.members([members[0]])
    assert found == [True]
    assert holds(read, 1)
    assert tiers._memory.free_ranges() == [(ENTRY, 3 * ENTRY)], "one block: it was not copied"
    [again] = tiers.members([members[0]])
    assert again.modules["layer"].lora_a.data_ptr() == read.modules["layer"].lora_a.data_ptr()


def test_a_merge_is_read_from_the_store_into_that_memory(make, tmp_path):
    tiers = make(3, store_dir=str(tmp_path))
    keep(tiers, 7)
    tiers.forget(recipe(7).merge_id)
    found = lies_there(tiers)
    packed, _, tier = tiers.find(recipe(7))
    assert tier == "disk"
    assert found == [True]
    assert holds(packed.unpack(), 7)
    assert tiers._memory.free_ranges() == [(ENTRY, 3 * ENTRY)], "one block: it was not copied"


@pytest.mark.usefixtures("_no_cycles_are_looked_for")
def test_a_file_of_the_store_that_is_not_the_merge_leaves_its_room(make, tmp_path):
    tiers = make(3, store_dir=str(tmp_path))
    keep(tiers, 7)
    tiers.forget(recipe(7).merge_id)
    [file] = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tiers.find(recipe(7)) is None
    assert tiers._memory.free_ranges() == [(0, 3 * ENTRY)]


@pytest.mark.usefixtures("_no_cycles_are_looked_for")
def test_a_merge_of_the_store_that_is_refused_leaves_its_room(make, tmp_path):
    tiers = make(3, store_dir=str(tmp_path))
    keep(tiers, 7)
    tiers.forget(recipe(7).merge_id)

    def check(adapter: LoraAdapter) -> None:
        raise IncompatibleAdaptersError(f"adapter {adapter.name!r}: of another base model")

    tiers._check = check
    refused: Future[None] = Future()  # as a worker hands it on: with a cycle through its frames
    try:
        tiers.find(recipe(7))
    except IncompatibleAdaptersError as error:
        refused.set_exception(error)
    assert refused.exception() is not None
    assert tiers._memory.free_ranges() == [(0, 3 * ENTRY)]


@pytest.fixture
def _no_cycles_are_looked_for():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_cycles_are_looked_for")
@pytest.mark.parametrize("error", [AdapterChangedError, AdapterFormatError])
def test_a_member_that_is_refused_leaves_its_room_and_the_others(make, members, error):
    tiers = make(4)
    keep(tiers, 7)
    keep(tiers, 8)
    if error is AdapterChangedError:
        bad = replace(members[0], digest="0" * 64)
    else:
        folder = Path(members[0].path).with_name("nan")
        shutil.copytree(members[0].path, folder)
        tensors = load_file(folder / WEIGHTS_FILE)
        save_file({key: t * torch.nan for key, t in tensors.items()}, folder / WEIGHTS_FILE)
        bad = Member("nan", str(folder), describe_adapter(folder)[1], 1.0)
    refusals = []
    # All but the first of a set are read by other threads.
    for wanted in ([bad], [members[1], bad], [members[1], bad, members[2]]):
        with pytest.raises(error) as refused:
            tiers.members(wanted)
        refusals.append(refused.value)
    assert kept(tiers) == [7, 8]
    tiers._readers.shutdown()  # some may be at it still
    for member in members:
        tiers._host.pop(member.digest, None)
    free = tiers._memory.free_ranges()
    assert sum(end - start for start, end in free) == 2 * ENTRY, "all but 7 and 8"
    keep(tiers, 9)
    keep(tiers, 10)
    with pytest.raises(error):
        tiers.members([bad])
    assert kept(tiers) == [7, 8, 9, 10], "nothing is dropped for what has not been read yet"


@pytest.mark.usefixtures("stamped_at_once")
def test_files_that_are_as_the_front_end_saw_them_are_not_hashed(make, members):
    folder = Path(members[0].path)
    wrong = replace(members[0], digest="0" * 64, stamp=stamp(look(str(folder)).mark))
    [read] = make(3).members([wrong])
    assert holds(read, 1)
    assert read.digest == "0" * 64, "as it was told"
    os.utime(folder / WEIGHTS_FILE, (1, 1))
    with pytest.raises(AdapterChangedError):
        make(3).members([wrong])
    again = replace(members[0], stamp=wrong.stamp)
    assert holds(make(3).members([again])[0], 1), "touched, but of the same content"


class Meanwhile(HostMemory):
    """Something happens once, when a member's files are open and its weights are about to be read."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__(3 * ENTRY, pin=False)
        self._happens = [happens]

    def allocate(self, nbytes: int) -> torch.Tensor | None:
        if self._happens:
            self._happens.pop()()
        return super().allocate(nbytes)


@pytest.mark.usefixtures("stamped_at_once")
@pytest.mark.parametrize("other", [1, 2])
def test_files_that_change_while_they_are_read_are_hashed(make, members, other, tmp_path):
    shutil.copy(Path(members[other - 1].path, WEIGHTS_FILE), tmp_path / "other")
    folder = Path(members[0].path)
    member = replace(members[0], stamp=stamp(look(str(folder)).mark))
    tiers = make(3)
    tiers._memory = Meanwhile(lambda: (tmp_path / "other").replace(folder / WEIGHTS_FILE))
    if other == 1:
        assert holds(tiers.members([member])[0], 1)
        assert tiers._memory.free_ranges() == [(ENTRY, 3 * ENTRY)]
    else:
        with pytest.raises(AdapterChangedError, match=members[1].digest[:12]):
            tiers.members([member])
        assert tiers._memory.free_ranges() == [(0, 3 * ENTRY)]


@pytest.mark.usefixtures("stamped_at_once")
def test_a_folder_that_goes_elsewhere_while_it_is_read_is_the_one_that_was_seen(make, members):
    folder, other = (Path(member.path) for member in members[:2])
    member = replace(members[0], digest="as told", stamp=stamp(look(str(folder)).mark))

    def replaced() -> None:
        folder.rename(folder.with_name("old"))
        other.rename(folder)

    tiers = make(3)
    tiers._memory = Meanwhile(replaced)
    assert holds(tiers.members([member])[0], 1)


@pytest.mark.usefixtures("stamped_at_once")
def test_a_folder_that_leads_elsewhere_for_a_moment_is_not_the_one_that_was_seen(
    make, members, tmp_path, monkeypatch
):
    """The files that are read are compared with those that were seen, not what is there afterwards."""
    first, second = members[:2]
    lead_to(first.path, tmp_path / "link")
    member = replace(first, path=str(tmp_path / "link"))
    member = replace(member, stamp=stamp(look(member.path).mark))

    def flickers(*source: object, trust_digest: bool, **how: object) -> LoraAdapter:
        lead_to(second.path, tmp_path / "link")
        try:
            return load_adapter(*source, trust_digest=trust_digest, **how)
        finally:
            lead_to(first.path, tmp_path / "link")

    monkeypatch.setattr("vllm_lego.tiers.load_adapter", flickers)
    with pytest.raises(AdapterChangedError):
        make(3).members([member])


def lead_to(folder: str, link: Path) -> None:
    (new := link.with_name("new")).symlink_to(folder)
    new.replace(link)


@pytest.mark.usefixtures("stamped_at_once")
def test_half_of_one_version_and_half_of_another_is_a_change_not_a_bad_file(
    make, members, tmp_path, monkeypatch
):
    module = LoraModule(torch.ones(2, ENTRY // 16), torch.ones(ENTRY // 16, 2))  # of rank 2, not 1
    save_adapter(LoraAdapter("other", {"layer": module}), tmp_path / "other")
    folder = Path(members[0].path)
    member = replace(members[0], stamp=stamp(look(str(folder)).mark))
    refusals = []

    def overtaken(*source: object, trust_digest: bool, **how: object) -> LoraAdapter:
        if trust_digest:
            (tmp_path / "other" / WEIGHTS_FILE).replace(folder / WEIGHTS_FILE)
        try:
            return load_adapter(*source, trust_digest=trust_digest, **how)
        except LegoError as error:
            refusals.append(type(error))
            raise

    monkeypatch.setattr("vllm_lego.tiers.load_adapter", overtaken)
    tiers = make(3)
    with pytest.raises(AdapterChangedError):
        tiers.members([member])
    assert refusals == [AdapterFormatError, AdapterChangedError]
    assert tiers._memory.free_ranges() == [(0, 3 * ENTRY)]
    with pytest.raises(AdapterFormatError, match="rank 1"):
        load_adapter(folder)


def test_a_member_in_shards_is_brought_together_in_that_memory(make, tmp_path):
    save_adapter(adapter(3), whole := tmp_path / "whole")
    halves = load_file(whole / WEIGHTS_FILE)
    (folder := tmp_path / "shards").mkdir()
    shutil.copy(whole / "adapter_config.json", folder)
    shards = {key: f"part{i}.safetensors" for i, key in enumerate(sorted(halves))}
    for key, shard in shards.items():
        save_file({key: halves[key]}, folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": shards}))
    tiers = make(1)
    [read] = tiers.members([Member("3", str(folder), load_adapter(folder).digest, 1.0)])
    assert holds(read, 3)
    assert all(tiers._memory.holds(m.lora_a) for m in read.modules.values())
    assert tiers._memory.free_ranges() == []


def test_members_and_merges_share_it_and_the_least_recently_used_goes(make, members):
    tiers = make(3)
    tiers.members([members[0]])[0]
    for number in (11, 12):
        keep(tiers, number)
    tiers.members([members[0]])[0]
    keep(tiers, 13)
    assert kept(tiers) == [12, 13]
    assert [event[:2] for event in tiers.events()] == [("evictions", "host")]
    Path(members[0].path, "adapter_model.safetensors").unlink()
    assert holds(tiers.members([members[0]])[0], 1)


def test_entries_go_until_there_is_room_in_one_piece(make):
    tiers = make(4)
    for number in (1, 2, 3, 4):
        keep(tiers, number)
    tiers.forget(recipe(3).merge_id)
    keep(tiers, 5, entries=2)  # 3 is free, its neighbour 2 is the second to go
    assert kept(tiers) == [4, 5]
    assert tiers.host_account() == (2, 3 * ENTRY)


def test_nothing_goes_for_what_is_larger_than_the_budget(make):
    tiers = make(2)
    keep(tiers, 1)
    keep(tiers, 2, entries=3)
    assert kept(tiers) == [1]


def test_what_somebody_reads_is_not_written_over(make):
    tiers = make(2)
    keep(tiers, 1)
    reader = tiers.find(recipe(1))[0].unpack()  # views alone
    for number in range(2, 6):
        keep(tiers, number)
    assert kept(tiers) == [5], "the reader has half of the memory"
    assert holds(reader, 1)
    del reader
    keep(tiers, 6)
    assert kept(tiers) == [5, 6]


def test_what_finds_no_room_is_served_and_written_but_not_kept(make, members, tmp_path):
    tiers = make(1, store_dir=str(tmp_path / "store"))
    reader = tiers.members([members[0]])[0]
    assert holds(tiers.members([members[1]])[0], 2)
    keep(tiers, 7)
    assert kept(tiers) == []
    packed, _, tier = tiers.find(recipe(7))
    assert tier == "disk"
    assert holds(packed.unpack(), 7)
    assert kept(tiers) == []
    assert holds(reader, 1)
    del reader
    tiers.find(recipe(7))
    assert kept(tiers) == [7]


def test_without_a_budget_nothing_is_kept(make, members):
    tiers = make(0)
    keep(tiers, 7)
    assert holds(tiers.members([members[0]])[0], 1)
    assert tiers.find(recipe(7)) is None


def test_threads_that_read_keep_and_drop_see_only_what_they_asked_for(make, members):
    tiers = make(4)
    wrong: list[object] = []

    def work(seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        try:
            for _ in range(150):
                number, kind = (int(torch.randint(6, (), generator=draws)) for _ in range(2))
                number += 1
                if kind < 2:
                    read = tiers.members([members[number - 1]])[0]
                elif (found := tiers.find(recipe(number))) is not None:
                    read = found[0].unpack()
                else:
                    keep(tiers, number)
                    continue
                if not holds(read, number):
                    wrong.append((number, read))
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(kept.nbytes for kept in tiers._host.values()) <= 4 * ENTRY
