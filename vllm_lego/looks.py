"""Looks at files, shared by requests that want the same at nearly the same time.

A volume may not answer for minutes, so threads look at what is on one that is not known to be local: a
path that does not answer holds one of them, however many requests name it. Local file systems answer
from memory: there the event loop looks itself, because in a burst of requests all of them would wait
until it hears of a thread, and then go on all at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from functools import cache
from pathlib import Path

SHARED_S = 0.02
"""Requests share a look that is younger: under load each would wait for threads of its own. Older
ones they share as long as their path does not answer."""
_REMEMBERED = 4096
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = [
    "btrfs",
    "erofs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "overlay",
    "ramfs",
    "squashfs",
    "tmpfs",
    "xfs",
    "zfs",
]

Seen = Hashable
Sight = tuple[Callable[[str], Seen], str]
"""A function that looks at a path, and the path."""


class _Look:
    """One look: when it was asked for, and what was seen."""

    __slots__ = ("asked", "is_behind", "is_local", "seen")

    def __init__(self, asked: float) -> None:
        self.asked = asked
        self.is_behind = False  # its thread is at another path, which may not answer
        self.is_local = False  # so far as anybody knows
        self.seen: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()

    def can_be_shared(self, now: float) -> bool:
        return now - self.asked < SHARED_S or not (self.seen.done() or self.is_behind)

    def take(self, sight: Sight, tell: Callable[..., object]) -> None:
        see, path = sight
        try:
            seen = see(path)
        except Exception as error:  # noqa: BLE001  theirs who wait
            tell(self.seen.set_exception, error)
        else:
            tell(self.seen.set_result, seen)


class Looks:
    """What paths look like now.

    Args:
        threads: that wait for the files; by default the event loop's.
    """

    def __init__(self, threads: Executor | None = None) -> None:
        self._threads = threads
        self._latest: dict[Sight, _Look] = {}

    async def at(self, sights: Iterable[Sight]) -> dict[Sight, Seen]:
        """Look at paths, all that nobody is looking at in at most one trip to a thread."""
        now = time.monotonic()
        looks, for_thread = {}, {}
        for sight in sights:
            look = latest = self._latest.get(sight)
            if look is None or not look.can_be_shared(now):
                look = self._latest[sight] = _Look(now)
                if latest is not None and latest.is_local:
                    look.is_local = True
                    look.take(sight, _call)
                else:
                    for_thread[sight] = look
            looks[sight] = look
        if for_thread:
            loop = asyncio.get_running_loop()
            loop.run_in_executor(self._threads, _take, for_thread, loop.call_soon_threadsafe)
            self._forget(now)
        # Shielded: others may share what this request began, when its client has left.
        return {sight: await asyncio.shield(look.seen) for sight, look in looks.items()}

    def _forget(self, now: float) -> None:
        """Let go of looks that nobody can share, once there are many."""
        if len(self._latest) > _REMEMBERED:
            kept = {sight: look for sight, look in self._latest.items() if look.can_be_shared(now)}
            self._latest = kept


def _take(looks: Mapping[Sight, _Look], tell: Callable[..., object]) -> None:
    """Look at paths one after the other, and tell of each at once."""
    for look in list(looks.values())[1:]:
        look.is_behind = True
    for sight, look in looks.items():
        look.is_behind = False
        look.is_local = _is_local(sight[1])
        look.take(sight, tell)


def _call(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)


def _is_local(path: str) -> bool:
    """Whether a path is on a file system that is known to answer from memory."""
    with suppress(OSError):
        return Path(path).stat().st_dev in _local_devices()
    return False


@cache  # what is mounted later is left to threads
def _local_devices() -> frozenset[int]:
    """Return the devices of the local file systems that are mounted, as `stat` has them."""
    try:
        mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:  # not Linux
        return frozenset()
    numbers = [m[2].split(":") for m in mounts if m[m.index("-") + 1] in _LOCAL]
    return frozenset(os.makedev(int(major), int(minor)) for major, minor in numbers)
