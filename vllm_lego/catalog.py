"""Which adapters can be named, and what they hold now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from lego_core import AdapterConfig, LegoError, describe_adapter
from lego_core.adapter_io import CONFIG_FILE, WEIGHTS_FILE
from vllm_lego.errors import UnknownAdapterError, UnmergeableError

_REMEMBERED = 4096


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
        self._known: LRUCache[tuple[object, ...], CatalogEntry] = LRUCache(_REMEMBERED)

    def names(self) -> list[str]:
        """Return the names that a request may use."""
        return sorted(self._served)

    async def look_up(self, names: Iterable[str], *, param: str) -> list[CatalogEntry]:
        """Describe adapters, reading the files only of those that changed since last time.

        Args:
            names: the adapters.
            param: the field of the request that names them.

        Raises:
            UnknownAdapterError: nobody named one of them here.
            UnmergeableError: files are missing or not a mergeable adapter.
        """
        paths: dict[str, str] = {}
        for name in names:
            path = self._served.get(name)
            if path is None:
                raise UnknownAdapterError(f"adapter {name!r} is not served here", param=param)
            paths[name] = path
        stamps = await asyncio.to_thread(lambda: [_stamp(path) for path in paths.values()])
        entries = []
        for (name, path), stamp in zip(paths.items(), stamps, strict=True):
            key = (name, path, stamp)
            if stamp is None or key not in self._known:
                try:
                    self._known[key] = await asyncio.to_thread(_describe, name, path)
                except LegoError as error:
                    raise UnmergeableError(str(error), param=param) from error
            entries.append(self._known[key])
        return entries


def _stamp(path: str) -> tuple[int, ...] | None:
    """Return what changes whenever the files do; None when they cannot be found."""
    try:
        stats = [(Path(path) / file).stat() for file in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError:
        return None
    return tuple(n for s in stats for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))


def _describe(name: str, path: str) -> CatalogEntry:
    config, digest, nbytes = describe_adapter(path, name=name)
    return CatalogEntry(name, path, config, digest, nbytes)
