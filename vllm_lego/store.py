"""The store: merges on disk, one safetensors file each, for servers that start later and replicas.

A file's name is the merge's id, so its content never changes and nobody needs a lock: it appears
whole, by a rename, or not at all. Everything is read from the folder each time, nothing remembered:
other servers may share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors

from lego_core import LegoError, LoraAdapter, LoraModule
from vllm_lego.identity import MERGE_ID
from vllm_lego.recipe import Recipe

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_SUFFIX = ".safetensors"
_UNFINISHED, _BROKEN = ".unfinished", ".broken"
_FORGOTTEN_AFTER_S = 3600.0
_MAX_HEADER_BYTES = 64 << 20
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."


class _NotThisMergeError(Exception):
    """A file that is not what its name says: truncated, foreign or damaged."""


class MergeStore:
    """A folder of merges, bounded in bytes.

    Nothing here raises: a store that fails is as good as none, and `tell` hears of it.

    Args:
        folder: made if it is not there.
        max_bytes: of all files together; beyond it the least recently used are deleted. An
            unfinished file of another writer counts too.
        tell: called with (`evictions`, `disk`) or (`errors`, reason) for the metrics; from any
            thread.
    """

    def __init__(self, folder: Path, max_bytes: int, tell: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._tell = tell

    def load(self, recipe: Recipe) -> tuple[LoraAdapter, float] | None:
        """Return a merge, on the CPU, and its fidelity; None when it is not there, whole and right.

        A file that is not what it should be is set aside, for somebody to look at, and will be
        written again.
        """
        path = self._path(recipe.merge_id)
        try:
            content = path.read_bytes()
            loaded = _parse(content, recipe)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("store_read", f"{path} cannot be read: {error.strerror}")
            return None
        except _NotThisMergeError as error:
            self._failed("store_broken", f"{path} is set aside: {error}")
            self._quietly(path.replace, path.with_name(path.name + _BROKEN))
            return None
        self._quietly(os.utime, path)  # used now: the last to be deleted
        return loaded

    def save(self, recipe: Recipe, adapter: LoraAdapter, fidelity: float) -> None:
        """Write a merge, whose tensors lie on the CPU, unless it is there; delete what is too much."""
        path = self._path(recipe.merge_id)
        if path.exists():
            return
        content = _format(recipe, adapter, fidelity)
        if len(content) > self._max_bytes:
            return
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            with unfinished.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            _sync_folder(self._folder)
        except OSError as error:
            self._failed("store_write", f"{path} cannot be written: {error.strerror}")
            self._quietly(unfinished.unlink)

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
            with self._path(identity).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                metadata = _header(file.read(min(size, _MAX_HEADER_BYTES)))
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
        forgotten = time.time() - _FORGOTTEN_AFTER_S
        for entry, of_file, used in files:
            unfinished = entry.name.endswith(_UNFINISHED)
            if unfinished and used > forgotten:
                continue  # another writer is at it
            if unfinished or size + nbytes > self._max_bytes:
                Path(entry).unlink(missing_ok=True)
                size -= of_file
                if not unfinished:
                    self._tell("evictions", "disk")

    def _files(self) -> Iterator[tuple[os.DirEntry[str], int, float]]:
        """Every file of ours with its size in bytes and the time of its last use."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.lstrip(".").startswith("lego-") and _SUFFIX in entry.name:
                        try:
                            stat = entry.stat()
                        except OSError:  # another server was quicker
                            continue
                        yield entry, stat.st_size, stat.st_mtime
        except OSError:
            return

    def _path(self, identity: str) -> Path:
        return self._folder / f"{identity}{_SUFFIX}"

    def _failed(self, reason: str, message: str) -> None:
        logger.warning("store: %s", message)
        self._tell("errors", reason)

    def _quietly(self, action: Callable[..., Any], *args: Any) -> None:
        try:
            action(*args)
        except OSError as error:
            logger.info("store: %s", error)


def _format(recipe: Recipe, adapter: LoraAdapter, fidelity: float) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        tensors[f"{_PREFIX}{name}{_A}"] = module.lora_a
        tensors[f"{_PREFIX}{name}{_B}"] = module.lora_b
    return format_safetensors(
        {name: tensor.clone() for name, tensor in tensors.items()},  # views may share a buffer
        {
            "format": "pt",
            "lego_recipe": recipe.encode(),
            "lego_fidelity": repr(fidelity),
            "lego_sha256": _checksum(tensors, recipe),
        },
    )


def _parse(content: bytes, recipe: Recipe) -> tuple[LoraAdapter, float]:
    metadata = _header(content[8 : 8 + int.from_bytes(content[:8], "little")])
    stored = _recipe_of(metadata)
    if stored.content != recipe.content:
        raise _NotThisMergeError(f"it holds another merge, {stored.merge_id}")
    try:
        tensors = parse_safetensors(content)
        fidelity = float(metadata["lego_fidelity"])
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _NotThisMergeError(str(error)) from error
    if _checksum(tensors, stored) != metadata.get("lego_sha256"):
        raise _NotThisMergeError("its checksum is wrong")
    modules = {
        name.removeprefix(_PREFIX).removesuffix(_A): LoraModule(a, tensors[_other(name)])
        for name, a in sorted(tensors.items())
        if name.endswith(_A)
    }
    return LoraAdapter(recipe.merge_id, modules), fidelity


def _other(name: str) -> str:
    return name.removesuffix(_A) + _B


def _header(header: bytes) -> dict[str, str]:
    try:
        metadata = json.loads(header)["__metadata__"]
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _NotThisMergeError("it is no safetensors file with metadata") from error


def _recipe_of(metadata: dict[str, str]) -> Recipe:
    try:
        return Recipe.decode(metadata["lego_recipe"])
    except (ValueError, KeyError, TypeError, LegoError) as error:
        raise _NotThisMergeError("it holds no recipe") from error


def _checksum(tensors: dict[str, torch.Tensor], recipe: Recipe) -> str:
    """Return a SHA-256 (hex) over names, dtypes, shapes and bytes of all tensors, and the recipe."""
    sha = hashlib.sha256(recipe.encode().encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
