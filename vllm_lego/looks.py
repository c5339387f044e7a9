"""Looks at files, in threads, shared by requests that want the same at nearly the same time.

A volume may not answer for minutes. So the event loop looks at nothing itself, and a path that does
not answer holds one thread, however many requests name it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Executor

SHARED_S = 0.02
"""Requests share a look that is younger: under load each would wait for threads of its own. Older
ones they share as long as their path does not answer."""
_REMEMBERED = 4096

Seen = Hashable
Sight = tuple[Callable[[str], Seen], str]
"""A function that looks at a path, and the path."""


class _Look:
    """One look: when it was asked for, and what was seen."""

    __slots__ = ("asked", "is_behind", "seen")

    def __init__(self, asked: float) -> None:
        self.asked = asked
        self.is_behind = False  # its thread is at another path, which may not answer
        self.seen: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()

    def can_be_shared(self, now: float) -> bool:
        return now - self.asked < SHARED_S or not (self.seen.done() or self.is_behind)


class Looks:
    """What paths look like now.

    Args:
        threads: that wait for the files; by default the event loop's.
    """

    def __init__(self, threads: Executor | None = None) -> None:
        self._threads = threads
        self._latest: dict[Sight, _Look] = {}

    async def at(self, sights: Iterable[Sight]) -> dict[Sight, Seen]:
        """Look at paths, all that nobody is looking at in one trip to a thread."""
        now = time.monotonic()
        looks, new = {}, {}
        for sight in sights:
            look = self._latest.get(sight)
            if look is None or not look.can_be_shared(now):
                look = self._latest[sight] = new[sight] = _Look(now)
            looks[sight] = look
        if new:
            loop = asyncio.get_running_loop()
            loop.run_in_executor(self._threads, _look, new, loop.call_soon_threadsafe)
            self._forget(now)
        # Shielded: others may share what this request began, when its client has left.
        return {sight: await asyncio.shield(look.seen) for sight, look in looks.items()}

    def _forget(self, now: float) -> None:
        """Let go of looks that nobody can share, once there are many."""
        if len(self._latest) > _REMEMBERED:
            kept = {sight: look for sight, look in self._latest.items() if look.can_be_shared(now)}
            self._latest = kept


def _look(new: Mapping[Sight, _Look], call: Callable[..., object]) -> None:
    """Look at paths one after the other, and tell of each at once."""
    for look in list(new.values())[1:]:
        look.is_behind = True
    for (see, path), look in new.items():
        look.is_behind = False
        try:
            seen = see(path)
        except Exception as error:  # noqa: BLE001  theirs who wait
            call(look.seen.set_exception, error)
        else:
            call(look.seen.set_result, seen)
