"""The files of an adapter folder: opened with care, read once, never mapped into memory.

A mapped file that somebody truncates kills the process with SIGBUS, and the engine reads these
files while it serves. So they are read, straight into the tensors' memory: loading needs the size
of the tensors that are kept, the header (at most `MAX_HEADER_BYTES`) and 36 MiB.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from lego_core.adapter_config import json_object, parse_json_object, shown
from lego_core.errors import AdapterFormatError, AdapterNotFoundError

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PICKLE_FILE = "adapter_model.bin"
PICKLE_HINT = (
    f"{PICKLE_FILE} is a pickle, which executes code when read, so it is refused; convert it where "
    "you trust it: load it with torch.load(..., weights_only=True) and write it with "
    "safetensors.torch.save_file"
)
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 25
_REMEMBERED_HEADERS, _REMEMBERED_BYTES = 16, 1 << 18

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes of LoRA weights by their name in safetensors."""


Room = Callable[[int], torch.Tensor | None]
"""Gives memory on the CPU for tensors of so many bytes, shape [bytes], uint8, or None if it has none."""


Observe = Callable[[str, os.stat_result], None]
"""Told a file's name and what `fstat` says of it once it has been read."""


class MemoryShortError(MemoryError):
    """A file says that it holds more than there is memory: nothing was read."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header; `nbytes` long, after all that come before it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@contextmanager
def opened(
    folder: Path, file: str, name: str, observe: Observe | None = None
) -> Iterator[BinaryIO]:
    """Open a regular file of a folder; whatever goes wrong until it is closed is a `LegoError`.

    The folder may be a symlink. A file may be one too if it stays in the folder, or leads from a
    snapshot of the hub's cache to that cache's blobs.

    Raises:
        AdapterNotFoundError: no such file.
        AdapterFormatError: not a regular file, outside the folder, or unreadable.
    """
    try:
        home = Path(os.path.realpath(folder))
        path = Path(os.path.realpath(home / file))
        if path.parent != home and not _is_inside(path, home):
            raise _unreadable(name, file, "it is a link that leads out of the folder")
        if path.exists() and not path.is_file():  # opening a device or FIFO can have effects
            raise _unreadable(name, file, "it is no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as content:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _unreadable(name, file, "it is no regular file")
            yield content
            if observe is not None:
                observe(file, os.fstat(descriptor))
    except FileNotFoundError as error:
        hint = ""
        if file == WEIGHTS_FILE and (folder / PICKLE_FILE).exists():
            hint = f": {PICKLE_HINT}"
        raise AdapterNotFoundError(f"adapter {name!r} has no {file}{hint}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable(name, file, reason) from error
    except MemoryError as error:
        raise _unreadable(name, file, "there is not enough memory") from error


def read_small(
    folder: Path,
    file: str,
    name: str,
    limit: int = MAX_CONFIG_BYTES,
    observe: Observe | None = None,
) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        AdapterNotFoundError, AdapterFormatError: as `opened`, or it is larger.
    """
    with opened(folder, file, name, observe) as content:
        if os.fstat(content.fileno()).st_size > limit:
            raise AdapterFormatError(f"adapter {name!r}: {file} is larger than {limit} bytes")
        # One byte more than allowed: the file may grow while it is read.
        found = bytearray()
        while len(found) <= limit and (block := content.read(limit + 1 - len(found))):
            found += block
    if len(found) > limit:
        raise AdapterFormatError(f"adapter {name!r}: {file} is larger than {limit} bytes")
    return bytes(found)


def weight_files(
    folder: Path, name: str, observe: Observe | None = None
) -> tuple[list[str], bytes, Mapping[str, str]]:
    """Find the weights: one file, or the shards that an index names.

    The one file wins, as in PEFT and vLLM, which read nothing else.

    Returns:
        The files' names, the bytes of the index, and the shard of each tensor; the last two are
        empty if there is one file.

    Raises:
        AdapterNotFoundError, AdapterFormatError: as `opened`, or the index is nonsense.
    """
    if not os.path.lexists(folder / INDEX_FILE) or os.path.lexists(folder / WEIGHTS_FILE):
        return [WEIGHTS_FILE], b"", {}
    index = read_small(folder, INDEX_FILE, name, MAX_HEADER_BYTES, observe)
    shards = parse_index(index, name)
    return sorted(set(shards.values())), index, shards


def parse_index(content: bytes, name: str) -> Mapping[str, str]:
    """Return the shard of each tensor, a plain file name, from the bytes of an index.

    Raises:
        AdapterFormatError: it is no index, or names a file that is not plainly in the folder.
    """
    shards = parse_json_object(content, INDEX_FILE, name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise AdapterFormatError(f"adapter {name!r}: {INDEX_FILE} has no weight_map")
    for shard in set(map(repr, shards.values())):
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors'") or ".." in shard:
            raise AdapterFormatError(
                f"adapter {name!r}: {INDEX_FILE} names the shard {shard[:200]}; a shard must be a "
                "safetensors file in the same folder"
            )
    return shards


def digest_part(sha: Any, name: str, size: int) -> None:
    """Mark the border before an index or shard of `size` bytes.

    A sole weights file has none, and cannot be mistaken for one: read as a header's length, a
    border would be beyond any file.
    """
    sha.update(b"\xff" * 8 + name.encode() + b"\0" + size.to_bytes(8, "big"))


def read_tensors(
    content: BinaryIO,
    file: str,
    name: str,
    sha: Any,
    wanted: Callable[[TensorEntry], bool],
    room: Room | None = None,
) -> dict[str, torch.Tensor]:
    """Read a safetensors file from its start to its end.

    Args:
        content: the file.
        file: its name, and
        name: the adapter's, for messages.
        sha: a `Digest`, or what reads as it does, that takes every byte.
        wanted: which tensors to keep, of those in `DTYPES`; it may refuse one by raising.
        room: gives memory to keep them in; new memory by default, or where it has none.

    Raises:
        AdapterFormatError: not a sound safetensors file.
        MemoryShortError: it is larger than the memory.
        MemoryError: there was less than that in the end.
    """
    size = os.fstat(content.fileno()).st_size
    entries = _read_header(content, size, file, name, sha)
    keep = {entry.key for entry in entries if wanted(entry)}
    memory = _memory(sum(entry.nbytes for entry in entries if entry.key in keep), room)
    view, filled = memory.numpy().data, 0
    for kept, run in groupby(entries, key=lambda entry: entry.key in keep):
        nbytes = sum(entry.nbytes for entry in run)
        if sha.take(content, nbytes, view[filled : filled + nbytes] if kept else None) < nbytes:
            raise _unreadable(name, file, "it became shorter while it was read")
        filled += nbytes * kept
    return _cut(memory, [entry for entry in entries if entry.key in keep])


def _memory(nbytes: int, room: Room | None) -> torch.Tensor:
    """Return memory, shape [nbytes], uint8: the given room, or new memory."""
    given = room(nbytes) if room else None
    if given is not None:
        return given
    there = _memory_bytes()
    if there is not None and nbytes > there:
        raise MemoryShortError(f"it needs {nbytes} bytes of memory, {there} are available")
    return torch.from_numpy(np.empty(nbytes, np.uint8))


def _cut(memory: torch.Tensor, entries: Sequence[TensorEntry]) -> dict[str, torch.Tensor]:
    """Return the tensors that follow each other in a memory, as views where they are aligned."""
    tensors: dict[str, torch.Tensor] = {}
    start = 0
    for name, run in groupby(entries, key=lambda entry: entry.dtype):
        alike, dtype = list(run), DTYPES[name]
        nbytes = sum(entry.nbytes for entry in alike)
        part = memory[start : start + nbytes]
        if start % dtype.itemsize or not nbytes:  # of no bytes, there is no view either
            part = torch.empty(nbytes, dtype=torch.uint8).copy_(part)
        sizes = [entry.nbytes // dtype.itemsize for entry in alike]
        cuts = torch.split(part.view(dtype), sizes)
        tensors |= {
            entry.key: cut.view(entry.shape) for entry, cut in zip(alike, cuts, strict=True)
        }
        start += nbytes
    return tensors


def _read_header(
    content: BinaryIO, size: int, file: str, name: str, sha: Any
) -> Sequence[TensorEntry]:
    """Read and check a safetensors header; return the tensors in the order of their data."""
    prefix = content.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise _unsound(name, file, "it is shorter than its header")
    if length > MAX_HEADER_BYTES:
        raise _unsound(name, file, f"its header has {length} bytes, over {MAX_HEADER_BYTES}")
    header = bytearray(length)
    sha.update(prefix)
    if sha.take(content, length, memoryview(header)) < length:
        raise _unreadable(name, file, "it became shorter while it was read")
    try:
        entries = (
            _remembered_entries(bytes(header)) if length <= _REMEMBERED_BYTES else _entries(header)
        )
    except ValueError as error:
        raise _unsound(name, file, str(error)) from error
    end = sum(entry.nbytes for entry in entries)
    if end != size - 8 - length:
        raise _unsound(name, file, f"it has {size} bytes, its header says {8 + length + end}")
    return entries


def _entries(header: bytes | bytearray) -> tuple[TensorEntry, ...]:
    """Return the tensors that a header describes, in the order of their data, without gaps.

    Raises:
        ValueError: it is not sound.
    """
    try:
        fields = json_object(header)
    except ValueError as error:
        raise ValueError(f"its header {error}") from error
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no object of strings")
    spans = []
    for key, value in fields.items():
        entry, start = _entry(key, value)
        if entry is None:
            raise ValueError(f"tensor {shown(key)} is described by {shown(value)}")
        spans.append((start, start + entry.nbytes, entry))
    spans.sort(key=lambda span: span[:2])
    end = 0
    for start, stop, entry in spans:
        if start != end:
            raise ValueError(f"tensor {entry.key!r} overlaps another or leaves a gap")
        end = stop
    return tuple(entry for _, _, entry in spans)


# Adapters of one model that were trained alike have the same header, and to parse it is much of what
# reading one takes Python's lock for. What is remembered takes 30 MiB at most.
_remembered_entries = lru_cache(_REMEMBERED_HEADERS)(_entries)


def _entry(key: str, value: Any) -> tuple[TensorEntry, int] | tuple[None, int]:
    """Return one entry of a header and where its data start; None if it contradicts itself."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return None, 0
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        return None, 0
    if not _is_sizes(shape) or len(shape) > 8 or not _is_sizes(offsets) or len(offsets) != 2:
        return None, 0
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        return None, 0
    return TensorEntry(key, dtype, tuple(shape), nbytes), offsets[0]


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _memory_bytes() -> int | None:
    """Return how much memory could be had; None where the system does not say.

    Linux grants more than there is and kills whoever uses it: a sparse file of a terabyte costs
    its maker nothing.
    """
    limits = []
    try:
        memory = Path("/proc/meminfo").read_text(encoding="ascii")
        limits += [int(kib) * 1024 for kib in re.findall(r"MemAvailable:\s+(\d+)", memory)]
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        limits += [int(limit)] if limit.isdecimal() else []
    except (OSError, ValueError):
        pass
    return min(limits, default=None)


def _is_inside(path: Path, home: Path) -> bool:
    """Whether a resolved path is in a resolved folder, or in the blobs of its hub cache.

    A cache has blobs for each repository, and since huggingface_hub 2 some for all of them.
    """
    if path.is_relative_to(home):
        return True
    snapshots, repository = home.parent, home.parent.parent
    own, shared = repository / "blobs", repository.parent / "blobs"
    return snapshots.name == "snapshots" and (path.parent == own or path.parent.parent == shared)


def _unreadable(name: str, file: str, reason: str) -> AdapterFormatError:
    return AdapterFormatError(f"adapter {name!r}: {file} cannot be read ({reason})")


def _unsound(name: str, file: str, reason: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"adapter {name!r}: {file} is not a readable safetensors file ({reason})"
    )
