"""Admission to the engine's adapter slots, so that nobody waits for ever.

vLLM runs at most `--max-loras` adapters at a time and lets the others wait until one of those has
no request left: never, while new ones keep coming. So requests pass here first, sets and single
adapters alike. At most as many names as there are slots are admitted at once; the others stand in
line, in the order of their first request. While somebody stands in line, as many of the names that
were admitted longest as there are names in line, and that had their `quantum`, admit no more
requests: their new ones go to the end of the line.

So the k-th in line is admitted after at most ceil(k / slots) * (quantum + the longest request).

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Admitted:
    """A name that has a slot, since when (monotonic seconds), and how many requests use it."""

    since: float
    requests: int


class Slots:
    """The slots of one engine, on one event loop.

    Args:
        count: names that are admitted at a time.
        quantum_s: how long a name may keep others waiting, in seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self, count: int, quantum_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.count = count
        self._quantum_s = quantum_s
        self._clock = clock
        # Both in order of arrival: the first admitted is the first to make room.
        self._admitted: dict[str, _Admitted] = {}
        self._line: dict[str, list[asyncio.Future[None]]] = {}
        self._pressing = 0

    def try_enter(self, name: str) -> bool:
        """Admit one request, if that takes nothing from those in line. Whoever enters leaves."""
        admitted = self._admitted.get(name)
        if admitted is not None:
            if self._must_make_room(name):
                return False
            admitted.requests += 1
            return True
        if self._line or self._pressing or len(self._admitted) >= self.count:
            return False
        self._admitted[name] = _Admitted(self._clock(), 1)
        return True

    async def stand_in_line(self, name: str) -> None:
        """Wait until the engine has a slot for this name. Whoever enters leaves, see `leave`.

        For whoever `try_enter` did not admit.
        """
        place = asyncio.get_running_loop().create_future()
        self._line.setdefault(name, []).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # admitted at the very moment it left
                self.leave(name)
            elif place in self._line.get(name, ()):
                self._line[name].remove(place)
                if not self._line[name]:
                    del self._line[name]
            raise

    def leave(self, name: str) -> None:
        """Give up the slot of one request that entered."""
        admitted = self._admitted[name]
        admitted.requests -= 1
        if not admitted.requests:
            del self._admitted[name]
            self._admit_next()

    @contextmanager
    def pressed(self) -> Iterator[None]:
        """Have all names that had their quantum admit no more requests, and admit no other name.

        For whoever needs what the admitted names keep from it besides their slots: the room that
        their merges take on the device.
        """
        self._pressing += 1
        try:
            yield
        finally:
            self._pressing -= 1
            self._admit_next()

    def in_use(self) -> int:
        """Return how many names are admitted."""
        return len(self._admitted)

    def waiting(self) -> int:
        """Return how many names stand in line."""
        return len(self._line)

    def _must_make_room(self, name: str) -> bool:
        if name in self._line:  # it did before, and stays behind those it let pass
            return True
        oldest = list(self._admitted)[: None if self._pressing else len(self._line)]
        return name in oldest and self._clock() - self._admitted[name].since >= self._quantum_s

    def _admit_next(self) -> None:
        # A name that is still draining and in line as well keeps its place there.
        for name in [n for n in self._line if n not in self._admitted]:
            if self._pressing or len(self._admitted) >= self.count:
                return
            # Whoever was cancelled in this turn of the loop is not here to be admitted.
            places = [place for place in self._line.pop(name) if not place.done()]
            if places:
                self._admitted[name] = _Admitted(self._clock(), len(places))
            for place in places:
                place.set_result(None)
