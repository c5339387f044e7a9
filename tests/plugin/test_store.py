"""The store: whole files or none, and whatever breaks it breaks nothing else.

Each fault is the real one: a full tmpfs, a killed process, a truncated file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lego_core import LoraAdapter, LoraModule, MergeConfig
from vllm_lego.packed import peft_tensors
from vllm_lego.recipe import Member, Recipe
from vllm_lego.store import MergeStore

MERGE = LoraAdapter(
    "lego-0000000000000001",
    {
        f"layer.{i}": LoraModule(
            torch.full((2, 64), float(i), dtype=torch.bfloat16),
            torch.ones(32, 2, dtype=torch.bfloat16),
        )
        for i in range(3)
    },
)


def recipe(number: int = 1) -> Recipe:
    members = (Member("a", "/a", f"digest{number}", 1.0), Member("b", "/b", "digest-b", 0.5))
    return Recipe(f"lego-{number:016x}", members, MergeConfig(rank=2))


class Told(list[tuple[str, str]]):
    """Evictions and errors; apart from them `seconds`: how long reads and writes took."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[tuple[str, float]] = []

    def __call__(self, kind: str, label: str, seconds: float) -> None:
        if kind == "store_seconds":
            self.seconds.append((label, seconds))
        else:
            self.append((kind, label))


def store(folder: Path, max_bytes: int = 1 << 20) -> tuple[MergeStore, Told]:
    told = Told()
    return MergeStore(folder, max_bytes, told), told


def same(one: LoraAdapter, other: LoraAdapter) -> bool:
    return one.modules.keys() == other.modules.keys() and all(
        torch.equal(m.lora_a, other.modules[n].lora_a)
        and torch.equal(m.lora_b, other.modules[n].lora_b)
        and m.lora_a.dtype == other.modules[n].lora_a.dtype
        for n, m in one.modules.items()
    )


def test_what_was_saved_is_loaded_by_another_server(tmp_path):
    first, written = store(tmp_path / "new" / "folder")
    first.save(recipe(), MERGE, 0.875)
    other, told = store(tmp_path / "new" / "folder")
    loaded = other.load(recipe())
    assert loaded is not None
    assert same(loaded[0], MERGE)
    assert loaded[1] == 0.875
    assert other.recipe(recipe().merge_id) == recipe()
    assert other.load(recipe(2)) is None
    assert told == []
    assert [operation for operation, _ in written.seconds + told.seconds] == ["write", "read"]
    assert all(0 < seconds < 60 for _, seconds in written.seconds + told.seconds)


def test_any_mix_of_dtypes_in_any_memory(tmp_path):
    draws = torch.Generator().manual_seed(0)
    shared = torch.randn(3 * 5 + 7 * 3, generator=draws)
    mixed = LoraAdapter(
        MERGE.name,
        {
            "whole": LoraModule(shared[21:].view(3, 5), shared[:21].view(7, 3)),
            "half": LoraModule(
                torch.randn(1, 3, generator=draws).half(), torch.randn(3, 1, generator=draws).half()
            ),
            "double": LoraModule(
                torch.randn(1, 3, generator=draws).double(), torch.randn(5, 1, generator=draws)
            ),
        },
    )
    kept, told = store(tmp_path)
    kept.save(recipe(), mixed, 1.0)
    loaded = kept.load(recipe())
    assert loaded is not None
    assert same(loaded[0], mixed)
    assert told == []
    with safe_open(next(tmp_path.iterdir()), "pt") as file:  # any reader of the format
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert torch.equal(found["base_model.model.whole.lora_A.weight"], shared[21:].view(3, 5))


def test_a_file_of_another_version_is_left_to_it(tmp_path):
    kept, told = store(tmp_path)
    kept.save(recipe(), MERGE, 1.0)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(b'"lego_format": "3"', b'"lego_format": "9"'))
    assert kept.load(recipe()) is None
    assert list(tmp_path.iterdir()) == [path]
    assert told == []


def test_a_file_that_memory_has_no_room_for_stays(tmp_path, monkeypatch):
    kept, told = store(tmp_path)
    kept.save(recipe(), MERGE, 1.0)
    monkeypatch.setattr("lego_core.adapter_files._memory_bytes", lambda: 10)
    assert kept.load(recipe()) is None
    assert told == [("errors", "store_read")]
    monkeypatch.undo()
    assert kept.load(recipe()) is not None


def test_where_the_members_lay_is_without_meaning(tmp_path):
    """Another replica may have them elsewhere: content, weights and configuration count."""
    kept, _ = store(tmp_path)
    kept.save(recipe(), MERGE, 1.0)
    moved = tuple(replace(member, path="/elsewhere") for member in recipe().members)
    assert kept.load(replace(recipe(), members=moved)) is not None


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def without_tensors(path: Path) -> None:
    header = path.read_bytes()[8:]
    metadata = json.JSONDecoder().raw_decode(header.decode("latin-1"))[0]["__metadata__"]
    content = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)


def without_a_half(path: Path) -> None:
    """Sound, and right by its own checksum."""
    modules = dict(MERGE.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vllm_lego.store.peft_tensors",
            lambda adapter: dict(
                list(peft_tensors(replace(adapter, modules=modules)).items())[:-1]
            ),
        )
        path.unlink()
        store(path.parent)[0].save(recipe(), MERGE, 1.0)


def foreign(path: Path) -> None:
    """A sound file, of another merge."""
    other, _ = store(path.parent / "other")
    other.save(recipe(2), MERGE, 1.0)
    shutil.copy(path.parent / "other" / f"{recipe(2).merge_id}.safetensors", path)


def no_safetensors(path: Path) -> None:
    path.write_bytes(b"\xff" * 1000)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        emptied,
        one_bit_flipped,
        foreign,
        no_safetensors,
        without_tensors,
        without_a_half,
    ],
)
def test_a_file_that_is_not_the_merge_is_set_aside_and_written_again(tmp_path, damage):
    kept, told = store(tmp_path)
    kept.save(recipe(), MERGE, 1.0)
    (path,) = tmp_path.glob("*.safetensors")
    damage(path)
    assert kept.load(recipe()) is None
    assert told == [("errors", "store_broken")]
    assert [p.name for p in tmp_path.glob("*.broken")] == [path.name + ".broken"]
    kept.save(recipe(), MERGE, 1.0)
    loaded = kept.load(recipe())
    assert loaded is not None
    assert same(loaded[0], MERGE)


def test_it_is_bounded_and_drops_what_was_used_longest_ago(tmp_path):
    probe, _ = store(tmp_path / "probe")
    probe.save(recipe(), MERGE, 1.0)
    (size,) = probe.merges().values()
    kept, told = store(tmp_path / "store", 3 * size + 30)
    paths = {i: tmp_path / "store" / f"{recipe(i).merge_id}.safetensors" for i in range(1, 6)}
    for i in (1, 2, 3):
        kept.save(recipe(i), MERGE, 1.0)
        os.utime(paths[i], (i, i))
    assert kept.load(recipe(1)) is not None  # used now
    kept.save(recipe(4), MERGE, 1.0)
    kept.save(recipe(5), MERGE, 1.0)
    assert sorted(kept.merges()) == [recipe(i).merge_id for i in (1, 4, 5)]
    assert told == [("evictions", "disk")] * 2
    assert sum(p.stat().st_size for p in (tmp_path / "store").iterdir()) <= 3 * size + 30


def test_what_a_killed_writer_left_is_cleared_away_in_time(tmp_path):
    kept, told = store(tmp_path)
    left = tmp_path / ".lego-0000000000000009.safetensors.abc.unfinished"
    left.write_bytes(b"x" * 1000)
    kept.save(recipe(), MERGE, 1.0)
    assert left.exists()  # its writer may be at it
    os.utime(left, (1, 1))
    kept.save(recipe(2), MERGE, 1.0)
    assert not left.exists()
    assert told == []


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system without room for a merge."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(full):
    kept, told = store(full)
    kept.save(recipe(), replace(MERGE, modules=dict(MERGE.modules) | BIG), 1.0)
    assert told == [("errors", "store_write")]
    assert list(full.iterdir()) == []
    assert kept.load(recipe()) is None


BIG = {"big": LoraModule(torch.ones(2, 4096), torch.ones(4096, 2))}

WRITE_BEYOND_THE_LIMIT = """
import resource, sys
from pathlib import Path
from tests.plugin.test_store import MERGE, recipe, store
kept, told = store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
kept.save(recipe(), MERGE, 1.0)
print(told, list(Path(sys.argv[1]).iterdir()))
"""


def test_a_write_that_the_system_cuts_short(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", WRITE_BEYOND_THE_LIMIT, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "[('errors', 'store_write')] []"


def test_store_unreadable(tmp_path):
    """A folder that is a file can be neither read nor written, whoever asks."""
    (tmp_path / "store").write_text("no folder")
    kept, told = store(tmp_path / "store")
    assert kept.load(recipe()) is None
    kept.save(recipe(), MERGE, 1.0)
    assert told == [("errors", "store_read"), ("errors", "store_write")]
    assert kept.merges() == {}
    assert kept.recipes() == []
    assert kept.recipe(recipe().merge_id) is None


WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from tests.plugin.test_store import MERGE, recipe, store
kept, _ = store(Path(sys.argv[1]), 1 << 17)
for i in itertools.count(1):
    kept.save(recipe(i), MERGE, 1.0)
    if i == 1:
        print("one is there", flush=True)
"""


def test_kill_9_in_the_middle_of_a_write(tmp_path):
    for kill in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.05 + 0.013 * kill)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        kept, told = store(tmp_path)
        merges = kept.merges()
        assert merges
        for identity in merges:
            loaded = kept.load(recipe(int(identity.removeprefix("lego-"), 16)))
            assert loaded is not None
            assert same(loaded[0], MERGE)
        assert told == []


def test_an_embedding_stays_one(tmp_path):
    modules = dict(MERGE.modules)
    modules["embed_tokens"] = replace(modules["layer.0"], is_embedding=True)
    kept, _ = store(tmp_path)
    kept.save(recipe(), replace(MERGE, modules=modules), 1.0)
    loaded = kept.load(recipe())
    assert loaded is not None
    assert [n for n, m in loaded[0].modules.items() if m.is_embedding] == ["embed_tokens"]
    assert same(loaded[0], LoraAdapter("merge", modules))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_a_merge(path: Path) -> None:
    other, _ = store(path.parent / "other")
    other.save(recipe(), MERGE, 1.0)
    path.symlink_to(path.parent / "other" / path.name)


def sparse_terabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("make", [pipe, folder, link_to_a_merge, sparse_terabyte])
def test_what_is_no_file_of_ours_holds_nobody_up(tmp_path, make):
    kept, told = store(tmp_path)
    path = tmp_path / f"{recipe().merge_id}.safetensors"
    make(path)
    assert kept.recipe(recipe().merge_id) is None
    assert kept.recipes() == []
    assert kept.load(recipe()) is None
    assert told == [("errors", "store_broken")]
    kept.save(recipe(), MERGE, 1.0)
    assert kept.load(recipe()) is not None
    assert path.is_file()


def test_a_merge_for_another_base_model_under_this_name_is_set_aside(tmp_path):
    """The same members and configuration, but the id of another base model or dtype."""
    kept, told = store(tmp_path)
    other = replace(recipe(), merge_id="lego-00000000000000ff")
    kept.save(other, MERGE, 1.0)
    (path,) = tmp_path.glob("*.safetensors")
    path.rename(tmp_path / f"{recipe().merge_id}.safetensors")
    assert kept.load(recipe()) is None
    assert told == [("errors", "store_broken")]


def test_a_file_says_nothing_that_is_true_of_one_host_only(tmp_path):
    kept, told = store(tmp_path)
    kept.save(stamped(recipe()), MERGE, 1.0)
    [file] = tmp_path.iterdir()
    assert b"a stamp" not in file.read_bytes()
    assert kept.load(stamped(recipe())) is not None
    assert told == []


def test_what_somebody_wrote_into_a_file_is_not_taken_for_hashed(tmp_path):
    kept, _ = store(tmp_path)
    kept.save(recipe(), MERGE, 1.0)
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["lego_recipe"] = stamped(recipe()).encode()
    forged = json.dumps(header).encode()
    file.write_bytes(len(forged).to_bytes(8, "little") + forged + content[8 + length :])
    found = kept.recipe(recipe().merge_id)
    assert found == recipe()
    assert [member.stamp for member in found.members] == ["", ""]


def stamped(of: Recipe) -> Recipe:
    return replace(of, members=tuple(replace(member, stamp="a stamp") for member in of.members))
