"""Whatever lies in an adapter folder: a sound adapter comes out, or a `LegoError`; nothing else."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lego_core import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterWriteError,
    LegoError,
    LoraAdapter,
    LoraModule,
    describe_adapter,
    load_adapter,
    save_adapter,
)
from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import INDEX_FILE, WEIGHTS_FILE
from tests import strategies

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "embed_tokens"],
    "rank_pattern": {"x": 3},
}
A_KEY = "base_model.model.model.layers.0.q_proj.lora_A.weight"
B_KEY = "base_model.model.model.layers.0.q_proj.lora_B.weight"
TENSORS = {
    A_KEY: torch.ones(2, 4),
    B_KEY: torch.ones(3, 2, dtype=torch.bfloat16),
    "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9),
    "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(4, 2),
    "base_model.model.model.embed_tokens.base_layer.weight": torch.ones(9, 4),
}
PAIR = {CONFIG_FILE: json.dumps(CONFIG).encode(), WEIGHTS_FILE: save(TENSORS)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "sql"
    path.mkdir(exist_ok=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE):
        (path / file).unlink(missing_ok=True)
    for file, content in files.items():
        (path / file).write_bytes(content)
    return path


def check(path: Path) -> LoraAdapter | None:
    """Load; a sound adapter has all it promises, a refusal names the adapter."""
    try:
        adapter = load_adapter(path)
    except LegoError as error:
        assert "'sql'" in str(error)  # noqa: PT017
        str(error).encode()
        return None
    for module in adapter.modules.values():
        assert bool(torch.isfinite(module.lora_a).all())
        assert bool(torch.isfinite(module.lora_b).all())
        assert module.delta().shape == (module.out_features, module.in_features)
    assert describe_adapter(path)[1] == adapter.digest
    return adapter


def forged(entries: Any, data: bytes = b"\0" * 64) -> bytes:
    """A safetensors file with any header."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {A_KEY: entry([2, 4], 0, 32), B_KEY: entry([4, 2], 32, 64)}


def test_the_forger_can_make_a_sound_file(tmp_path: Path) -> None:
    files = {**PAIR, WEIGHTS_FILE: forged(GOOD)}
    assert check(write(tmp_path, files)) is not None
    assert check(write(tmp_path, PAIR)) is not None


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_tensors_that_lie_askew(tmp_path: Path, dtype: str) -> None:
    """A file may have them at any byte; memory that is read as numbers may not."""
    a, size = torch.arange(4).half() + 1, {"F32": 4, "F64": 8}[dtype]
    b = (torch.arange(3) + 5).to({"F32": torch.float32, "F64": torch.float64}[dtype])
    odd = {A_KEY: entry([1, 3], 0, 6, "F16"), B_KEY: entry([3, 1], 6, 6 + 3 * size, dtype)}
    data = a[:3].numpy().tobytes() + b.numpy().tobytes()
    config = json.loads(PAIR[CONFIG_FILE]) | {"r": 1}
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: forged(odd, data)}
    adapter = check(write(tmp_path, files))
    assert adapter is not None
    [module] = adapter.modules.values()
    assert torch.equal(module.lora_a, a[None, :3])
    assert torch.equal(module.lora_b, b[:, None])


def test_tensors_without_entries(tmp_path: Path) -> None:
    none = {A_KEY: entry([0, 4], 0, 0), B_KEY: entry([4, 0], 0, 0)}
    assert check(write(tmp_path, {**PAIR, WEIGHTS_FILE: forged(none, b"")})) is None


@pytest.mark.parametrize(
    "change",
    [
        {B_KEY: entry([4, 2], 0, 32)},
        {B_KEY: entry([4, 2], 31, 63)},
        {B_KEY: entry([2, 2], 48, 64)},
        {B_KEY: entry([4, 2], 32, 96)},
        {B_KEY: entry([4, 2], 64, 32)},
        {B_KEY: entry([8, 2], 32, 64)},
        {B_KEY: entry([2**40, 2**40], 32, 64)},
        {B_KEY: entry([-4, -2], 32, 64)},
        {B_KEY: entry([4, 2.0], 32, 64)},
        {B_KEY: entry([4, True], 32, 36)},
        {B_KEY: entry([0, 2], 32, 32), "x": entry([8], 32, 64)},
        {B_KEY: entry([2**62, 0], 32, 32)},
        {B_KEY: entry([4, 2] + [1] * 100, 32, 64)},
        {B_KEY: entry([4, 2], 32, 64, "F8_E4M3")},
        {B_KEY: entry([4, 1], 32, 64, "I64")},
        {B_KEY: entry([16, 2], 32, 64, "BOOL")},
        {B_KEY: entry([4, 2], 32, 64, "F33")},
        {B_KEY: entry([4, 2], 32, 64, ["F32"])},
        {B_KEY: {"dtype": "F32"}},
        {B_KEY: 5},
        {B_KEY: entry([4, 2], 32, 64) | {"more": 1}},
        {"__metadata__": 5},
        {"__metadata__": {"a": {"b": "c"}}},
        {"__metadata__": [["a", "b"]]},
        {B_KEY: entry([4, 2], "32", "64")},
        {B_KEY: entry([4, 2], None, None)},
    ],
    ids=str,
)
def test_forged_header_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    files = {**PAIR, WEIGHTS_FILE: forged(GOOD | change)}
    assert check(write(tmp_path, files)) is None


@pytest.mark.parametrize(
    "header",
    [
        json.dumps(GOOD).encode()[:-1] + b"," + json.dumps(GOOD).encode()[1:],
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps(GOOD).encode("utf-16"),
        b"\xff" + json.dumps(GOOD).encode(),
        b"",
        b"null",
    ],
    ids=["twice", "lists", "objects", "utf-16", "ff", "empty", "null"],
)
def test_header_that_is_no_header(tmp_path: Path, header: bytes) -> None:
    assert check(write(tmp_path, {**PAIR, WEIGHTS_FILE: forged(header)})) is None


@given(file=st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]), data=st.data())
@settings(max_examples=300)
def test_damaged_files(tmp_path: Path, file: str, data: st.DataObject) -> None:
    content = bytearray(PAIR[file])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "remove"])):
            case "flip":
                content[position] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                content = content[: max(position, 1)]
            case "insert":
                content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
            case _ if len(content) > 9:
                del content[position : position + 8]
    check(write(tmp_path, {**PAIR, file: bytes(content)}))


@given(field=st.sampled_from([*CONFIG, "use_rslora", "bias", "more"]), value=strategies.json_values)
def test_any_field_of_the_configuration(tmp_path: Path, field: str, value: object) -> None:
    config = json.dumps(CONFIG | {field: value}).encode()
    check(write(tmp_path, {**PAIR, CONFIG_FILE: config}))


@given(key=st.sampled_from([A_KEY, B_KEY, "__metadata__", "x"]), value=strategies.json_values)
def test_any_entry_of_the_header(tmp_path: Path, key: str, value: object) -> None:
    check(write(tmp_path, {**PAIR, WEIGHTS_FILE: forged(GOOD | {key: value})}))


@given(key=st.text(max_size=30), suffix=st.sampled_from(["", ".lora_A.weight"]))
def test_any_name_of_a_tensor(tmp_path: Path, key: str, suffix: str) -> None:
    entries = {key + suffix: GOOD[A_KEY], B_KEY: GOOD[B_KEY]}
    check(write(tmp_path, {**PAIR, WEIGHTS_FILE: forged(entries)}))


@given(index=st.binary(max_size=50) | strategies.json_values.map(lambda v: json.dumps(v).encode()))
def test_any_index(tmp_path: Path, index: bytes) -> None:
    path = write(tmp_path, {CONFIG_FILE: PAIR[CONFIG_FILE], INDEX_FILE: index})
    assert check(path) is None


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "out", "up", "dangling"])
def test_what_is_no_file_of_the_folder(tmp_path: Path, file: str, kind: str) -> None:
    path = write(tmp_path, PAIR)
    content = (path / file).read_bytes()
    (path / file).unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(content)
    match kind:
        case "fifo":
            os.mkfifo(path / file)
        case "folder":
            (path / file).mkdir()
        case _:
            target = {"device": "/dev/zero", "loop": file, "out": outside, "up": "../outside"}
            (path / file).symlink_to(target.get(kind, "nothing"))
    assert check(path) is None


def test_links_within_the_folder_and_to_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR)
    (path / "data").mkdir()
    (path / WEIGHTS_FILE).rename(path / "data" / "blob")
    (path / WEIGHTS_FILE).symlink_to("data/blob")
    (tmp_path / "link").symlink_to(path)
    assert load_adapter(tmp_path / "link").digest == load_adapter(path).digest


def test_links_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file, content in PAIR.items():
        (blobs / file[-9:]).write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{file[-9:]}")
    assert load_adapter(snapshot).rank == 2


@pytest.mark.parametrize("size", [1 << 42, 1 << 50])
def test_sparse_giant_is_refused_before_it_is_read(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, PAIR)
    rows = size // 4 // 4 * 2
    entries = {A_KEY: entry([2, 4], 0, 32), B_KEY: entry([rows, 2], 32, 32 + rows * 8)}
    header = forged(entries, b"")
    (path / WEIGHTS_FILE).write_bytes(header)
    try:
        os.truncate(path / WEIGHTS_FILE, len(header) + 32 + rows * 8)
    except OSError:
        pytest.skip("this file system makes no such files")
    with pytest.raises(AdapterFormatError, match=r"'sql'.*memory"):
        load_adapter(path)
    (path / WEIGHTS_FILE).write_bytes(PAIR[WEIGHTS_FILE])
    os.truncate(path / CONFIG_FILE, size)
    with pytest.raises(AdapterFormatError, match=r"'sql'.*larger"):
        load_adapter(path)


def test_loading_takes_the_memory_of_the_tensors_once(tmp_path: Path) -> None:
    """The base model's copy is not kept either."""
    base = {f"{'x' * 9}.embed_tokens.base_layer.weight": torch.zeros(1 << 24)}
    lora = {A_KEY: torch.zeros(2, 1 << 22), B_KEY: torch.zeros(1, 2)}
    path = write(tmp_path, {**PAIR, WEIGHTS_FILE: save(base | lora)})
    size = (1 << 23) * 4
    with address_space_left(size + size // 2):
        adapter = load_adapter(path)
    assert adapter.nbytes == size + 8


@contextmanager
def address_space_left(nbytes: int) -> Iterator[None]:
    """Let this process have only so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


SMALL = LoraAdapter("a", {"m.q_proj": LoraModule(torch.ones(2, 4), torch.ones(3, 2))})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_saving_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").touch()
    with pytest.raises(AdapterWriteError, match="not empty"):
        save_adapter(SMALL, out)
    assert names(out) == {"notes"}
    save_adapter(SMALL, out, overwrite=True)
    assert names(out) == {CONFIG_FILE, WEIGHTS_FILE}
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("step", ["save_file", "_flush", "_move"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    save_adapter(SMALL, out)
    before = load_adapter(out).digest

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"lego_core.adapter_save.{step}", full)
    with pytest.raises(AdapterWriteError, match=r"No space left.*Make room"):
        save_adapter(SMALL, out, overwrite=True, provenance={"x": 1})
    assert load_adapter(out).digest == before
    assert names(tmp_path) == {"out"}


def test_a_second_move_that_fails_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    save_adapter(SMALL, out)

    def once(self: Path, target: Path) -> Path:
        if target.name == "out" and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(AdapterWriteError):
        save_adapter(SMALL, out, overwrite=True)
    assert names(tmp_path) == {"out"}
    assert load_adapter(out).rank == 2


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper", "\0"):
        with pytest.raises(AdapterWriteError):
            save_adapter(SMALL, folder, overwrite=True)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    "provenance", [{"x": object()}, {"x": float("nan")}, {(1, 2): 3}, {"x": "\ud800"}]
)
def test_provenance_that_is_not_json(tmp_path: Path, provenance: Any) -> None:
    with pytest.raises(LegoError, match="provenance"):
        save_adapter(SMALL, tmp_path / "out", provenance=provenance)
    assert names(tmp_path) == set()


def test_missing_is_not_found(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "\0", "\udcff", "x" * 5000):
        with pytest.raises((AdapterNotFoundError, AdapterFormatError)):
            load_adapter(source)
