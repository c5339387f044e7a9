"""Which adapters can be named, and what they hold now."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from lego_core import AdapterConfig, LegoError, describe_adapter
from lego_core.adapter_io import CONFIG_FILE
from vllm_lego.adapter_set import shown
from vllm_lego.errors import UnknownAdapterError, UnmergeableError

_REMEMBERED = 4096

_Stamp = tuple[tuple[str | int, ...], ...]
_Key = tuple[str, str, _Stamp | None]
"""Name, folder, and what changes whenever its files do."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """An adapter as it lies on disk: configuration, content digest and size of the weights."""

    name: str
    path: str
    config: AdapterConfig
    digest: str
    nbytes: int


class Catalog:
    """The adapters that the operator named, and nothing else.

    Args:
        served: the folder by name of every adapter that may be named now; it may change.
    """

    def __init__(self, served: Mapping[str, str]) -> None:
        self._served = served
        self._known: LRUCache[_Key, CatalogEntry] = LRUCache(_REMEMBERED)
        self._reading: dict[_Key, asyncio.Task[CatalogEntry]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._served

    def names(self) -> list[str]:
        """Return the names that a request may use."""
        return sorted(self._served)

    def check_names(self, names: Iterable[str], *, param: str) -> list[str]:
        """Return the names if each may be used.

        Raises:
            UnknownAdapterError: nobody named one of them here.
        """
        names = list(names)
        for name in names:
            if name not in self._served:
                raise UnknownAdapterError(f"adapter {shown(name)} is not served here", param=param)
        return names

    async def look_up(self, names: Iterable[str], *, param: str) -> list[CatalogEntry]:
        """Describe adapters, reading the files only of those that changed since last time.

        Args:
            names: the adapters.
            param: the field of the request that names them.

        Raises:
            UnknownAdapterError: nobody named one of them here.
            UnmergeableError: files are missing or not a mergeable adapter.
        """
        paths = {name: self._served[name] for name in self.check_names(names, param=param)}
        stamps = await asyncio.to_thread(lambda: [_stamp(path) for path in paths.values()])
        try:
            return [
                self._known.get((*item, stamp)) or await self._read((*item, stamp))
                for item, stamp in zip(paths.items(), stamps, strict=True)
            ]
        except LegoError as error:
            raise UnmergeableError(str(error), param=param) from error

    async def _read(self, key: _Key) -> CatalogEntry:
        """Read an adapter's files, once for all who ask meanwhile."""
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.create_task(asyncio.to_thread(_describe, key[0], key[1]))
            self._reading[key] = reading
            reading.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(reading)

    def _finish(self, key: _Key, reading: asyncio.Task[CatalogEntry]) -> None:
        del self._reading[key]
        if not reading.cancelled() and reading.exception() is None and key[2] is not None:
            self._known[key] = reading.result()


def _stamp(path: str) -> _Stamp | None:
    """Return what changes whenever the files do, shards and their index too; None if there are none."""
    try:
        with os.scandir(path) as files:
            stats = {file.name: file.stat() for file in files if _is_read(file.name)}
    except OSError:
        return None
    return tuple(
        (name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for name, stat in sorted(stats.items())
    )


def _is_read(file: str) -> bool:
    return file == CONFIG_FILE or ".safetensors" in file


def _describe(name: str, path: str) -> CatalogEntry:
    # A Path is always a folder: what was not allowed is not fetched, whatever its name.
    config, digest, nbytes = describe_adapter(Path(path), name=name)
    return CatalogEntry(name, path, config, digest, nbytes)
