"""Looks at files, shared by requests that want the same at nearly the same time.

A volume may not answer for minutes, so a thread looks at what is not known to be local: a path that does
not answer holds one, however many requests name it. Local file systems answer from memory: there the
event loop looks itself, because in a burst of requests all of them would wait until it hears of a
thread, and then go on all at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import NamedTuple

SHARED_S = 0.02
"""Requests share a look that is younger: under load each would wait for threads of its own. Older
ones they share as long as their path does not answer."""
_REMEMBERED = 4096
_MOUNTS = Path("/proc/self/mountinfo")
_WRITABLE = ("ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
_IMAGES = ("erofs", "squashfs")


class Seen(NamedTuple):
    """What a look saw.

    Attributes:
        mark: changes when what is there does; None when nothing is.
        devices: that were asked, as `stat` has them.
    """

    mark: Hashable = None
    devices: frozenset[int] = frozenset()


Sight = tuple[Callable[[str], Seen], str]
"""A function that looks at a path, and the path."""


class _Look(NamedTuple):
    """When a look was asked for, and what it sees."""

    asked: float
    seen: asyncio.Future[Seen]

    def can_be_shared(self, now: float) -> bool:
        return now - self.asked < SHARED_S or not self.seen.done()

    def was_local(self) -> bool:
        """Whether all that it asked is on file systems that are known to answer from memory."""
        if self.seen.exception() is not None:
            return False
        devices = self.seen.result().devices
        return bool(devices) and devices <= _local_devices()


class Looks:
    """What paths look like now.

    Args:
        threads: that wait for the files; by default the event loop's.
    """

    def __init__(self, threads: Executor | None = None) -> None:
        self._threads = threads
        self._latest: dict[Sight, _Look] = {}

    def at_once(self, sights: Iterable[Sight]) -> list[Hashable] | None:
        """Look at paths. Returns the mark of each; None if a thread looks at one, from now on or already."""
        looks = self._begin_all(sights)
        return (
            [look.result().mark for look in looks] if all(look.done() for look in looks) else None
        )

    async def at(self, sights: Iterable[Sight]) -> list[Hashable]:
        """Look at paths. Returns the mark of each."""
        # Shielded: others may share what this request began, when its client has left.
        return [(await asyncio.shield(look)).mark for look in self._begin_all(sights)]

    def _begin_all(self, sights: Iterable[Sight]) -> list[asyncio.Future[Seen]]:
        now = time.monotonic()
        return [self._begin(sight, now) for sight in sights]

    def _begin(self, sight: Sight, now: float) -> asyncio.Future[Seen]:
        latest = self._latest.get(sight)
        if latest is not None and latest.can_be_shared(now):
            return latest.seen
        see, path = sight
        loop = asyncio.get_running_loop()
        if latest is not None and latest.was_local():
            seen: asyncio.Future[Seen] = loop.create_future()
            seen.set_result(see(path))
        else:
            seen = loop.run_in_executor(self._threads, see, path)
        if len(self._latest) >= _REMEMBERED:
            young = {s: look for s, look in self._latest.items() if look.can_be_shared(now)}
            self._latest = young
        self._latest[sight] = _Look(now, seen)
        return seen


def local_devices(*, images: bool = False) -> frozenset[int]:
    """Return the devices of the local file systems that are mounted, as `stat` has them.

    Args:
        images: those too whose times are not their own but come with the image.
    """
    try:
        mounts = [line.split(" ") for line in os.fsdecode(_MOUNTS.read_bytes()).split("\n") if line]
    except OSError:  # not Linux
        return frozenset()
    kinds = _WRITABLE + _IMAGES if images else _WRITABLE
    numbers = [m[2].split(":") for m in mounts if m[m.index("-", 6) + 1] in kinds]
    return frozenset(os.makedev(int(major), int(minor)) for major, minor in numbers)


@cache
def _local_devices() -> frozenset[int]:
    return local_devices(images=True)
