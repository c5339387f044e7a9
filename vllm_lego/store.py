"""The store: merges on disk, one safetensors file each, for servers that start later and replicas.

A file's name is the merge's id, so its content never changes and nobody needs a lock: it appears
whole, by a rename, or not at all. Everything is read from the folder each time, nothing remembered:
other servers may share it.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lego_core import LegoError, LoraAdapter, LoraModule
from lego_core.adapter import shared_memory
from lego_core.adapter_files import DTYPES, Room, read_tensors
from lego_core.adapter_save import PREFIX
from lego_core.digest import Digest, Unhashed
from vllm_lego.identity import MERGE_ID
from vllm_lego.packed import EMBEDDING_HALVES, LINEAR_HALVES, peft_tensors
from vllm_lego.recipe import Recipe

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_SUFFIX = ".safetensors"
_UNFINISHED, _BROKEN = ".unfinished", ".broken"
_FORGOTTEN_AFTER_S = 3600.0
_MAX_HEADER_BYTES = 64 << 20
_FORMAT = "3"  # to be raised when what is written below changes
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _NotThisMergeError(Exception):
    """A file that is not what its name says: truncated, foreign or damaged."""


class _OtherFormatError(Exception):
    """A file of another version of this program."""


class MergeStore:
    """A folder of merges, bounded in bytes.

    Nothing here raises: a store that fails is as good as none, and `tell` hears of it.

    Args:
        folder: made if it is not there.
        max_bytes: of all files together; beyond it the least recently used are deleted. An
            unfinished file of another writer counts too.
        tell: called with (`evictions`, `disk`, seconds unused), (`store_seconds`, `read` or `write`,
            seconds) or (`errors`, reason, 0) for the metrics; from any thread.
    """

    def __init__(
        self, folder: Path, max_bytes: int, tell: Callable[[str, str, float], None]
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._tell = tell
        self._writing = threading.Lock()

    def load(self, recipe: Recipe, room: Room | None = None) -> tuple[LoraAdapter, float] | None:
        """Return a merge, on the CPU, and its fidelity; None when it is not there, whole and right.

        A file that is not what it should be is set aside, for somebody to look at, and will be
        written again.

        Args:
            recipe: of the merge.
            room: gives memory to read it to, see `load_adapter`.
        """
        path = self._path(recipe.merge_id)
        started = time.perf_counter()
        try:
            with _opened(path) as file:
                loaded = _parse(file, self._max_bytes, recipe, room)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("store_read", f"{path} cannot be read: {error.strerror}")
            return None
        except MemoryError as error:
            self._failed("store_read", f"{path} cannot be read: {error}")
            return None
        except _OtherFormatError:  # another version's, to whom it is right
            return None
        except _NotThisMergeError as error:
            self._failed("store_broken", f"{path} is set aside: {error}")
            self._quietly(path.replace, path.with_name(path.name + _BROKEN))
            return None
        self._quietly(os.utime, path)  # used now: the last to be deleted
        self._tell("store_seconds", "read", time.perf_counter() - started)
        return loaded

    def save(self, recipe: Recipe, adapter: LoraAdapter, fidelity: float) -> None:
        """Write a merge, whose tensors lie on the CPU, unless it is there; delete what is too much."""
        path = self._path(recipe.merge_id)
        if os.path.lexists(path):
            return
        started = time.perf_counter()
        parts = _format(recipe.unstamped(), adapter, fidelity)
        nbytes = sum(map(len, parts))
        if nbytes > self._max_bytes:
            return
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            with self._writing:  # two that make room for one file each would write two into it
                self._folder.mkdir(parents=True, exist_ok=True)
                self._make_room(nbytes)
                with unfinished.open("xb") as file:
                    file.writelines(parts)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(path)
                _sync_folder(self._folder)
                self._make_room(0)  # another server may have done so all the same
        except OSError as error:
            self._failed("store_write", f"{path} cannot be written: {error.strerror}")
            self._quietly(unfinished.unlink)
        else:
            self._tell("store_seconds", "write", time.perf_counter() - started)

    def delete(self, identity: str) -> bool:
        """Delete a merge. Returns whether it is gone."""
        path = self._path(identity)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._failed("store_write", f"{path} cannot be deleted: {error.strerror}")
            return False
        return True

    def recipe(self, identity: str) -> Recipe | None:
        """Return how a stored merge was made; None when it is not there."""
        metadata = self._metadata(identity)
        return None if metadata is None else _recipe_of(metadata)

    def recipes(self) -> list[tuple[Recipe, int, float]]:
        """Return recipe, size of the file in bytes and fidelity of every merge that is there."""
        found = []
        for identity, nbytes in self.merges().items():
            metadata = self._metadata(identity)
            if metadata is not None:
                fidelity = float(metadata["lego_fidelity"])
                found.append((_recipe_of(metadata), nbytes, fidelity))
        return found

    def _metadata(self, identity: str) -> dict[str, str] | None:
        """Read what the head of a file says, if it says all that it should."""
        try:
            with _opened(self._path(identity)) as file:
                metadata = _header(file)
            _recipe_of(metadata)
            float(metadata["lego_fidelity"])
        except (OSError, _NotThisMergeError, ValueError, KeyError):
            return None
        return metadata

    def merges(self) -> dict[str, int]:
        """Return the size in bytes of every merge that is there, by its id."""
        return {
            entry.name.removesuffix(_SUFFIX): size
            for entry, size, _ in self._files()
            if MERGE_ID.fullmatch(entry.name.removesuffix(_SUFFIX))
        }

    def _make_room(self, nbytes: int) -> None:
        files = sorted(self._files(), key=lambda file: file[2])
        size = sum(size for _, size, _ in files)
        now = time.time()
        for entry, of_file, used in files:
            unfinished = entry.name.endswith(_UNFINISHED)
            if unfinished and now - used < _FORGOTTEN_AFTER_S:
                continue  # another writer is at it
            if unfinished or size + nbytes > self._max_bytes:
                Path(entry).unlink(missing_ok=True)
                size -= of_file
                if not unfinished:
                    self._tell("evictions", "disk", max(0.0, now - used))  # clocks differ

    def _files(self) -> Iterator[tuple[os.DirEntry[str], int, float]]:
        """Every file of ours with its size in bytes and the time of its last use."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.lstrip(".").startswith("lego-") and _SUFFIX in entry.name:
                        try:
                            if not entry.is_file(follow_symlinks=False):
                                continue
                            status = entry.stat(follow_symlinks=False)
                        except OSError:  # another server was quicker
                            continue
                        yield entry, status.st_size, status.st_mtime
        except OSError:
            return

    def _path(self, identity: str) -> Path:
        return self._folder / f"{identity}{_SUFFIX}"

    def _failed(self, reason: str, message: str) -> None:
        logger.warning("store: %s", message)
        self._tell("errors", reason, 0)

    def _quietly(self, action: Callable[..., Any], *args: Any) -> None:
        try:
            action(*args)
        except OSError as error:
            logger.info("store: %s", error)


def _opened(path: Path) -> BinaryIO:
    """Open a file of the store.

    Raises:
        _NotThisMergeError: it is a link, which may lead anywhere, or no regular file.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a pipe would wait for its other end
        raise _NotThisMergeError("it is no regular file")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def _format(recipe: Recipe, adapter: LoraAdapter, fidelity: float) -> list[memoryview]:
    """Return a safetensors file in parts: the header, and the memory of each tensor.

    Not by the library: it forms the bytes of the whole file while no other thread of the process
    gets to run, the engine's neither.
    """
    tensors = {name: tensor.contiguous() for name, tensor in peft_tensors(adapter).items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].data_ptr()))
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "lego_format": _FORMAT,
            "lego_recipe": recipe.encode(),
            "lego_fidelity": repr(fidelity),
            "lego_checksum": _checksum(tensors, recipe),
        }
    }
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [start, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # the data are aligned
    length = len(described).to_bytes(8, "little")
    return [memoryview(length + described), *_contents(tensors)]


def _contents(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """Return the memory of tensors, in one piece where they lie in this order in one."""
    memory = shared_memory(list(tensors.values()))
    pieces = list(tensors.values()) if memory is None else [memory]
    return [piece.view(-1).view(torch.uint8).numpy().data for piece in pieces]


def _parse(
    file: BinaryIO, max_bytes: int, recipe: Recipe, room: Room | None
) -> tuple[LoraAdapter, float]:
    if os.fstat(file.fileno()).st_size > max_bytes:
        raise _NotThisMergeError(f"it is larger than {max_bytes} bytes")
    metadata = _header(file)
    stored = _recipe_of(metadata)
    if (stored.merge_id, stored.content) != (recipe.merge_id, recipe.content):
        raise _NotThisMergeError(f"it holds another merge, {stored.merge_id}")
    if metadata.get("lego_format") != _FORMAT:
        raise _OtherFormatError
    file.seek(0)
    try:
        # Not by the library, which copies the whole file while no other thread gets to run.
        tensors = read_tensors(file, "its file", recipe.merge_id, Unhashed(), lambda _: True, room)
        fidelity = float(metadata["lego_fidelity"])
        if _checksum(tensors, stored) != metadata.get("lego_checksum"):
            raise _NotThisMergeError("its checksum is wrong")
        modules: dict[str, LoraModule] = {}
        for name, lora_a in sorted(tensors.items()):
            for a, b in (LINEAR_HALVES, EMBEDDING_HALVES):
                if name.endswith(a):
                    layer = name.removesuffix(a)
                    modules[layer.removeprefix(PREFIX)] = LoraModule(
                        lora_a, tensors[layer + b], is_embedding=a in EMBEDDING_HALVES
                    )
    except (LegoError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _NotThisMergeError(str(error)) from error
    return LoraAdapter(recipe.merge_id, modules), fidelity


def _header(file: BinaryIO) -> dict[str, str]:
    size = int.from_bytes(file.read(8), "little")
    header = file.read(min(size, _MAX_HEADER_BYTES))
    try:
        metadata = json.loads(header)["__metadata__"]
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _NotThisMergeError("it is no safetensors file with metadata") from error


def _recipe_of(metadata: dict[str, str]) -> Recipe:
    try:
        return Recipe.decode(metadata["lego_recipe"]).unstamped()
    except (ValueError, KeyError, TypeError, LegoError) as error:
        raise _NotThisMergeError("it holds no recipe") from error


def _checksum(tensors: Mapping[str, torch.Tensor], recipe: Recipe) -> str:
    """Return a digest (hex) of the recipe, names, dtypes, shapes and bytes of tensors, in order."""
    described = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    sha = Digest(json.dumps([recipe.encode(), *described]).encode())
    for content in _contents(tensors):
        sha.update(content)
    return sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
