"""Which adapters can be named, and what they hold now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachetools import LRUCache

from lego_core import AdapterConfig, LegoError, describe_adapter
from vllm_lego.access import Access
from vllm_lego.adapter_set import shown
from vllm_lego.errors import UnknownAdapterError, UnmergeableError
from vllm_lego.file_stamps import FilesMark, FilesRead, look, stamp
from vllm_lego.looks import Looks, Sight
from vllm_lego.settings import Settings, variable_name
from vllm_lego.sources import AdapterFolder, HubAdapters, HubAllowList

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_REMEMBERED = 4096

_Key = tuple[str, str, Hashable]
"""Name, folder, and what changes whenever its files do."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """An adapter as it lies on disk: configuration, content digest and size of the weights.

    `stamp` is its files' (see `file_stamps`), or empty.
    """

    name: str
    path: str
    config: AdapterConfig
    digest: str
    nbytes: int
    stamp: str = ""

    @property
    def max_rank(self) -> int:
        """The highest rank that its configuration gives a module."""
        return max(self.config.rank, *self.config.rank_pattern.values(), 0)


class _Read(NamedTuple):
    """An adapter that was read, and whether that holds for as long as its files look as they did."""

    entry: CatalogEntry
    is_lasting: bool


class Catalog:
    """The adapters that the operator named or allowed, and nothing else.

    Args:
        served: the folder by name of every adapter that vLLM serves itself; it may change.
        folder: the operator's folder of adapters, if there is one.
        hub: the hub's adapters, if some are allowed.
        access: what the caller may name.
        is_base_model: whether a name is the base model's, which no adapter can have.
        files: the threads that wait for the files; by default the event loop's.
    """

    def __init__(
        self,
        served: Mapping[str, str],
        folder: AdapterFolder | None = None,
        hub: HubAdapters | None = None,
        *,
        access: Access | None = None,
        is_base_model: Callable[[str], bool] = lambda _: False,
        files: Executor | None = None,
    ) -> None:
        self._served = served
        self._folder = folder
        self._hub = hub
        self._access = access or Access()
        self._is_base_model = is_base_model
        self._told: set[str] = set()
        self._known: LRUCache[_Key, CatalogEntry] = LRUCache(_REMEMBERED)
        self._files = files
        self._reading: dict[_Key, asyncio.Future[_Read]] = {}
        self._looks = Looks(files)

    @classmethod
    def of(
        cls,
        settings: Settings,
        served: Mapping[str, str],
        access: Access,
        is_base_model: Callable[[str], bool],
        files: Executor | None = None,
    ) -> Catalog:
        """Build the catalog that the settings ask for.

        Raises:
            SettingsError: one of them makes no sense.
        """
        folder = AdapterFolder(Path(settings.adapter_dir)) if settings.adapter_dir else None
        allowed = HubAllowList.parse(settings.hub_allow or "")
        hub = HubAdapters(allowed, settings.hub_max_bytes) if settings.hub_allow else None
        return cls(served, folder, hub, access=access, is_base_model=is_base_model, files=files)

    @property
    def has_more(self) -> bool:
        """Whether there can be adapters that vLLM does not serve itself."""
        return self._folder is not None or self._hub is not None

    def __contains__(self, name: object) -> bool:
        """Whether the caller may name it, as of the last `refresh`."""
        return isinstance(name, str) and self.is_named(name) and self._access.may_name(name)

    def is_named(self, name: str) -> bool:
        """Whether the operator named or allowed it, whoever asks, as of the last `refresh`."""
        return self._here(name) is not None or self._is_on_hub(name)

    def is_native(self, name: str) -> bool:
        """Whether vLLM serves it itself."""
        return name in self._served

    def names(self) -> list[str]:
        """Return the names that the caller may use and whose files are here, sorted."""
        fetched = self._hub.here() if self._hub else ()
        here = {*self._served, *self.folder_names(), *fetched}
        return sorted(filter(self._access.may_name, here))

    def folder_names(self) -> list[str]:
        """Return those of `names` that are the folder's, sorted."""
        adapters = self._folder.adapters if self._folder else ()
        return sorted(name for name in adapters if self._in_folder(name) and name in self)

    async def names_to_list(self) -> list[str]:
        """Return the names that vLLM's list of models lacks, as of now, sorted."""
        await self.refresh()
        return self.folder_names()

    def names_to_fetch(self) -> list[str]:
        """Return the names that the operator allowed whose files are not here yet, sorted.

        What a pattern allows cannot be listed.
        """
        if self._hub is None:
            return []
        absent = set(self._hub.allowed.names()) - self._hub.here().keys()
        return sorted(filter(self._access.may_name, absent))

    async def refresh(self, *, thorough: bool = True) -> None:
        """See which adapters there are now; see `AdapterFolder.refresh`."""
        if self._folder is not None:
            await self._folder.refresh(thorough=thorough)

    async def check_names(self, names: Iterable[str], *, param: str) -> list[str]:
        """Return the names if the caller may use each of them, and all of them together.

        Raises:
            UnknownAdapterError: nobody named or allowed one of them here.
            ForbiddenError: the policy keeps them apart.
        """
        names = list(names)
        if not all(name in self._served for name in names):
            # Whether a known one is still there, its files tell.
            await self.refresh(thorough=not all(map(self.is_named, names)))
        for name in names:
            if name not in self:
                raise UnknownAdapterError(f"adapter {shown(name)} is not served here", param=param)
        self._access.check(names, param=param)
        return names

    def look_up_at_once(self, names: Iterable[str], *, param: str) -> list[CatalogEntry] | None:
        """As `look_up`; None if there is something to wait for.

        As a rule there is not: adapters are where they were, have been read, and lie on a local file
        system.
        """
        here = self._where_they_were(list(names), param)
        marks = None if here is None else self._looks.at_once(self._sights(here))
        keys = None if here is None or marks is None else self._keys_if_as_seen(here, marks)
        entries = [entry for key in keys or () if (entry := self._known.get(key)) is not None]
        return entries if keys is not None and len(entries) == len(keys) else None

    async def look_up(self, names: Iterable[str], *, param: str) -> list[CatalogEntry]:
        """Describe adapters, reading the files only of those that changed since last time.

        Args:
            names: the adapters.
            param: the field of the request that names them.

        Raises:
            UnknownAdapterError, ForbiddenError: as `check_names`, or the hub does not have it.
            UnmergeableError: files are missing or not a mergeable adapter.
            BusyError: an adapter did not come from the hub.
        """
        keys = await self._keys(list(names), param)
        found = {key: entry for key in keys if (entry := self._known.get(key)) is not None}
        if unread := [key for key in keys if key not in found]:
            try:
                read = await asyncio.gather(*map(self._read, unread))
            except LegoError as error:
                raise UnmergeableError(str(error), param=param) from error
            found |= {key: one.entry for key, one in zip(unread, read, strict=True)}
        return [found[key] for key in keys]

    async def _keys(self, names: Sequence[str], param: str) -> list[_Key]:
        """Find adapters, and look at their files."""
        here = self._where_they_were(names, param)
        if here is not None:
            adapters = self._folder.adapters if self._folder else None
            keys = self._keys_if_as_seen(here, await self._looks.at(self._sights(here)))
            if keys is not None and (self._folder is None or self._folder.adapters is adapters):
                return keys
        await self.check_names(names, param=param)
        paths = await asyncio.gather(*(self._find(name, param) for name in names))
        marks = await self._looks.at((look, path) for path in paths)
        return list(zip(names, paths, marks, strict=True))

    def _where_they_were(self, names: Sequence[str], param: str) -> dict[str, str] | None:
        """Return the path of each name as of the last look, if the caller may have them."""
        here = {n: path for n in names if self._access.may_name(n) and (path := self._here(n))}
        if len(here) < len(names):
            return None
        self._access.check(names, param=param)
        return here

    def _sights(self, here: Mapping[str, str]) -> list[Sight]:
        """Return what tells whether adapters are where they were, and of what content: theirs, and the folder's."""
        sights: list[Sight] = [(look, path) for path in here.values()]
        if self._folder is not None and not all(name in self._served for name in here):
            sights.append(self._folder.sight)
        return sights

    def _keys_if_as_seen(
        self, here: Mapping[str, str], marks: Sequence[Hashable]
    ) -> list[_Key] | None:
        """Return the keys of adapters, given the marks at their `_sights`; None if the folder changed."""
        if len(marks) > len(here) and self._folder and not self._folder.is_as_seen(marks[-1]):
            return None
        return [(name, path, mark) for (name, path), mark in zip(here.items(), marks, strict=False)]

    def _in_folder(self, name: str) -> str | None:
        """Return where in the folder an adapter is, unless its name is taken."""
        path = self._folder.adapters.get(name) if self._folder else None
        if path is None or (name not in self._served and not self._is_base_model(name)):
            return path
        if name not in self._told:
            self._told.add(name)
            logger.warning(
                "%s: %r is the base model's name or one of --lora-modules, which wins; rename the "
                "folder",
                variable_name("adapter_dir"),
                name,
            )
        return None

    def _is_on_hub(self, name: str) -> bool:
        return self._hub is not None and self._hub.allows(name) and not self._is_base_model(name)

    def _here(self, name: str) -> str | None:
        return self._served[name] if name in self._served else self._in_folder(name)

    async def _find(self, name: str, param: str) -> str:
        """Return where an adapter is, from now on if it comes from the hub."""
        path = self._here(name)
        if path is None and self._hub is not None:
            path = await self._hub.folder(name, param=param)
        if path is None:
            raise UnknownAdapterError(f"adapter {shown(name)} is not served here", param=param)
        return path

    def _read(self, key: _Key) -> asyncio.Future[_Read]:
        """Read an adapter's files, once for all who ask meanwhile."""
        reading = self._reading.get(key)
        if reading is None:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self._files, _describe, *key)
            self._reading[key] = reading
            reading.add_done_callback(lambda done: self._finish(key, done))
        return asyncio.shield(reading)

    def _finish(self, key: _Key, reading: asyncio.Future[_Read]) -> None:
        del self._reading[key]
        if not reading.cancelled() and reading.exception() is None and reading.result().is_lasting:
            self._known[key] = reading.result().entry


def _describe(name: str, path: str, mark: Hashable) -> _Read:
    # A Path is always a folder: what was not allowed is not fetched, whatever its name.
    read = FilesRead()
    config, digest, nbytes = describe_adapter(Path(path), name=name, observe=read.note)
    as_seen = read.are(mark)
    stamped = stamp(mark) if as_seen else ""
    # Where files come from elsewhere, opening one may change what it looks like.
    is_lasting = as_seen or (isinstance(mark, FilesMark) and not mark.are_local())
    return _Read(CatalogEntry(name, path, config, digest, nbytes, stamped), is_lasting)
