"""Where adapters come from that vLLM does not know: a folder of folders, and the hub.

A name that a client sends is looked up, never joined to a path: it reaches the file system or the
hub only if it equals a name that is known, or matches what the operator allows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cachetools import TTLCache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lego_core import AdapterNotFoundError, HubError, LegoError, ResolvedSource, fetch_adapter
from lego_core.adapter_io import CONFIG_FILE
from vllm_lego.adapter_set import shown
from vllm_lego.errors import BusyError, HubFailedError, UnknownAdapterError, UnmergeableError
from vllm_lego.file_stamps import is_read
from vllm_lego.identity import MERGE_ID
from vllm_lego.looks import SHARED_S, Seen, Sight
from vllm_lego.settings import SettingsError, variable_name

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_FRESH_S = 1.0
_CLOCK_TICK_NS = 20_000_000  # file systems stamp with clocks that stand still for so long
_DOWNLOADS = 2
_WAITING_DOWNLOADS = 16
_FAILURES, _FAILED_FOR_S = 1024, 10.0

_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ENTRY = re.compile(
    rf"(?P<organisation>[A-Za-z0-9][\w.-]*)/\*|(?P<repository>{_REPOSITORY})(@(?P<revision>\S+))?",
    re.ASCII,
)
# No `refs/pr/1` and no commit: anybody can propose changes to a repository, and the hub serves a
# proposal's commits under the repository's name.
_NAME = re.compile(
    rf"(?P<repository>{_REPOSITORY})(@(?P<revision>[A-Za-z0-9][\w.-]{{0,99}}))?", re.ASCII
)
# What git takes for a commit: the head of its digits, or what `git describe` makes of them.
_COMMIT = re.compile(r"[0-9a-f]{4,}|.*-g[0-9a-f]{4,}", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class _Look:
    """A look at a folder: into every subfolder or not, whether it has begun, and the end of it."""

    thorough: bool = False
    asked: float = 0.0  # time.monotonic
    begun: bool = False
    answer: asyncio.Future[None] | None = None


class AdapterFolder:
    """A folder whose subfolders are adapters, by their names. It may change at any time.

    An adapter is a direct subfolder with an `adapter_config.json`. Links count if they stay inside:
    a subfolder may be a link to a folder inside this one, a file a link to one in its own folder.
    Names that begin with a dot, cannot be printed or look like a merge's id are left out, and so
    are all of several names that differ only in case or Unicode normalisation: copied to another
    volume, one of them would be another's.

    Args:
        folder: this folder.

    Raises:
        SettingsError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise SettingsError(f"{variable_name('adapter_dir')} is {str(folder)!r}, but no folder")
        self._folder = folder
        self.sight: Sight = (_status, str(folder))
        """What is to be looked at to know, without a `refresh`, whether one is needed."""
        self._seen: tuple[int, int, int] | None = None
        self._seen_at = 0.0
        self._told: set[str] = set()
        # One thread: whoever asks is answered by a look that began after that, or not long before.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lego-folder")
        self._look = _Look()
        self.adapters: Mapping[str, str] = self._scan()
        """The folder of each adapter by name, as of the last look."""

    async def refresh(self, *, thorough: bool = True) -> None:
        """Look whether there are others now; costs a stat if the folder has not changed.

        A subfolder that comes or goes is noticed at once, by looks that are not thorough `SHARED_S`
        later; a configuration that is written into one after that within a second, by thorough ones.
        """
        look = self._look
        now = time.monotonic()
        # One that has not begun is shared with whoever asked first, and so is a young one.
        shared = not look.begun or (not thorough and now - look.asked < SHARED_S)
        answer = look.answer
        if answer is None or not shared or thorough > look.thorough:
            look = self._look = _Look(thorough, now)
            loop = asyncio.get_running_loop()
            answer = look.answer = loop.run_in_executor(self._thread, self._refresh, look)
        await asyncio.shield(answer)

    def is_as_seen(self, mark: Hashable) -> bool:
        """Whether the same adapters are here as of the last look, given the mark at `sight`."""
        return mark is not None and mark == self._seen

    def _refresh(self, look: _Look) -> None:
        look.begun = True
        try:
            now = self._folder.stat()
        except OSError as error:
            self._tell(f"{self._folder} cannot be read: {error.strerror}")
            self.adapters, self._seen = {}, None
            return
        seen = _identity(now)
        stale = look.thorough and time.monotonic() - self._seen_at > _FRESH_S
        if seen != self._seen or stale:
            self._seen_at = time.monotonic()
            settled = abs(time.time_ns() - now.st_mtime_ns) > _CLOCK_TICK_NS
            self.adapters = self._scan()
            self._seen = seen if settled else None

    def _scan(self) -> dict[str, str]:
        home = os.path.realpath(self._folder)
        alike: dict[str, list[tuple[str, str]]] = defaultdict(list)
        try:
            with os.scandir(home) as entries:
                for entry in entries:
                    path = self._adapter_at(entry, home)
                    if path is not None:
                        alike[_folded(entry.name)].append((entry.name, path))
        except OSError as error:
            self._tell(f"{self._folder} cannot be read: {error.strerror}")
            return {}
        for names in alike.values():
            if len(names) > 1:
                self._tell(
                    f"{self._folder}: {', '.join(sorted(repr(name) for name, _ in names))} differ in "
                    "case or normalisation alone, so none of them can be named; rename all but one"
                )
        return dict(names[0] for names in alike.values() if len(names) == 1)

    def _adapter_at(self, entry: os.DirEntry[str], home: str) -> str | None:
        """Return the real path of an entry that is an adapter."""
        name = entry.name
        if name.startswith(".") or not name.isprintable() or MERGE_ID.fullmatch(name):
            return None
        try:
            if not entry.is_dir():
                return None
            path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            with os.scandir(path) as files:
                read = {file.name: file for file in files if is_read(file.name)}
            if CONFIG_FILE not in read or not read[CONFIG_FILE].is_file():
                return None
            links = [file for file in read.values() if file.is_symlink()]
            leave = [f.name for f in links if not _is_inside(os.path.realpath(f.path), path)]
        except OSError:  # it came or went just now, or is not for us
            return None
        if path == home or not _is_inside(path, home):
            leave.append(name)
        if leave:
            self._tell(f"{entry.path} is no adapter: {leave[-1]!r} is a link that leads elsewhere")
        return None if leave else path

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s: %s", variable_name("adapter_dir"), message)


def _status(path: str) -> Seen:
    try:
        status = os.stat(path)  # noqa: PTH116  the event loop waits for this, and pathlib takes a multiple
    except OSError:
        return Seen()
    return Seen(_identity(status), frozenset([status.st_dev]))


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a folder's entries do."""
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_inside(path: str, home: str) -> bool:
    return os.path.commonpath([path, home]) == home


@dataclass(frozen=True, slots=True)
class HubAllowList:
    """The hub repositories that may be named.

    Attributes:
        organisations: all of whose repositories may be.
        revisions: of each repository listed; None for its default branch, its branches and tags.
    """

    organisations: frozenset[str]
    revisions: Mapping[str, frozenset[str | None]]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the setting.

        Raises:
            SettingsError: an entry is none of `org/name`, `org/name@revision` and `org/*`.
        """
        organisations: set[str] = set()
        revisions: dict[str, set[str | None]] = defaultdict(set)
        for entry in text.replace(",", " ").split():
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise SettingsError(
                    f"{variable_name('hub_allow')} lists {entry!r}; expected org/name, "
                    "org/name@revision or org/*"
                )
            if match["organisation"]:
                organisations.add(match["organisation"])
            else:
                revisions[match["repository"]].add(match["revision"])
        return cls(frozenset(organisations), {k: frozenset(v) for k, v in revisions.items()})

    def find(self, name: str) -> tuple[str, str | None] | None:
        """Return repository and revision that a name stands for; None if it may not be named.

        A repository that is listed with one revision only stands for that revision, named or not.
        """
        repository, at, revision = name.partition("@")
        listed = self.revisions.get(repository, frozenset())
        if revision in listed:
            return repository, revision
        if not at and len(listed) == 1:
            (pinned,) = listed
            return repository, pinned
        match = _NAME.fullmatch(name)
        if match is None or (revision and _COMMIT.fullmatch(revision)):
            return None
        organisation = repository.partition("/")[0]
        if None not in listed and (listed or organisation not in self.organisations):
            return None
        try:
            validate_repo_id(repository)
        except HFValidationError:
            return None
        return repository, match["revision"]

    def names(self) -> list[str]:
        """Return the names that the operator wrote out."""
        return [
            repository if revision is None else f"{repository}@{revision}"
            for repository, revisions in self.revisions.items()
            for revision in revisions
        ]


class HubAdapters:
    """Adapters from the hub, downloaded when they are first asked for.

    A branch or tag is resolved once: its commit stays the one that is served until the restart.

    Args:
        allowed: what may be named.
        max_bytes: of one adapter's files.
    """

    def __init__(self, allowed: HubAllowList, max_bytes: int) -> None:
        self.allowed = allowed
        self._max_bytes = max_bytes
        self._fetched: dict[str, ResolvedSource] = {}
        self._failed: TTLCache[str, LegoError] = TTLCache(_FAILURES, _FAILED_FOR_S)
        self._fetching: dict[str, asyncio.Task[ResolvedSource]] = {}
        self._threads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="lego-hub")

    def allows(self, name: str) -> bool:
        """Whether a name may be asked for."""
        return self.allowed.find(name) is not None

    def here(self) -> dict[str, str]:
        """Return the folder of each adapter that was asked for and is here."""
        return {name: str(source.folder) for name, source in self._fetched.items()}

    async def folder(self, name: str, *, param: str) -> str:
        """Return where an adapter is, downloading it unless it is here. Once for all who ask.

        Raises:
            UnknownAdapterError: it is not allowed, or the hub does not have it for this server.
            UnmergeableError: it is larger than it may be, or not an adapter.
            HubFailedError: the hub did not deliver.
            BusyError: too many downloads wait.
        """
        fetched = self._fetched.get(name)
        if fetched is not None and await asyncio.to_thread(
            os.path.exists, fetched.folder / CONFIG_FILE
        ):
            return str(fetched.folder)
        failed = self._failed.get(name)
        try:
            if failed is not None:
                raise failed.with_traceback(None)
            return str((await self._fetch(name)).folder)
        except AdapterNotFoundError as error:
            raise UnknownAdapterError(str(error), param=param) from error
        except HubError as error:
            raise HubFailedError(
                f"adapter {shown(name)} did not come from the hub; the server's log says why. Try "
                "again later",
                param=param,
            ) from error
        except LegoError as error:
            raise UnmergeableError(str(error), param=param) from error

    async def _fetch(self, name: str) -> ResolvedSource:
        fetching = self._fetching.get(name)
        if fetching is None:
            if len(self._fetching) >= _WAITING_DOWNLOADS:
                raise BusyError(
                    f"{len(self._fetching)} adapters are being downloaded from the hub; try again later"
                )
            fetching = asyncio.create_task(self._download(name), name=f"hub {name}")
            self._fetching[name] = fetching
            fetching.add_done_callback(lambda done: self._finish(name, done))
        # A client that leaves, or waits no longer, cancels its own waiting, not the download.
        return await asyncio.shield(fetching)

    async def _download(self, name: str) -> ResolvedSource:
        found = self.allowed.find(name)
        if found is None:
            raise AdapterNotFoundError(f"adapter {shown(name)} is not served here")
        repository, revision = found
        known = self._fetched.get(name)
        if known is not None:  # somebody emptied the cache
            revision = known.revision

        def download() -> ResolvedSource:
            return fetch_adapter(repository, revision, name=name, max_bytes=self._max_bytes)

        return await asyncio.get_running_loop().run_in_executor(self._threads, download)

    def _finish(self, name: str, fetching: asyncio.Task[ResolvedSource]) -> None:
        del self._fetching[name]
        if fetching.cancelled():
            return
        error = fetching.exception()
        if error is None:
            source = self._fetched[name] = fetching.result()
            logger.info("%s is %s at commit %s", name, source.source, source.revision)
        elif isinstance(error, LegoError):
            logger.warning("hub: %s", error)
            self._failed[name] = error
        else:
            logger.error("hub: %s failed", name, exc_info=error)
