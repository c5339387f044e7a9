"""The merged-adapter cache: which merges this API server knows to be staged on every worker.

It holds no tensors, but decides how long the workers keep theirs. vLLM has an LRU of its own
for the adapters it has registered; nothing about that one follows from this.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import cachetools


@dataclass(slots=True)
class CachedMerge:
    """One merge that can be served.

    Attributes:
        recipe: how it was made, encoded.
        nbytes: size of its tensors on one worker, in bytes.
        fidelity: cosine to the exact weighted sum.
        hits: requests served from it since it was merged.
        is_registered: whether vLLM knows it.
        seconds: what it took to bring it to the device, by phase.
        last_used: monotonic seconds when the last request that needed it ended.
    """

    recipe: str
    nbytes: int
    fidelity: float
    hits: int = 0
    is_registered: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    last_used: float = field(default_factory=time.monotonic)


class CacheFullError(Exception):
    """What is in use leaves no room for another merge."""


class MergedAdapterCache(cachetools.LRUCache[str, CachedMerge]):
    """A byte-bounded LRU by merge id that never evicts a merge in use.

    `evicted` collects what `__setitem__` pushed out, for the caller to release on the workers.

    Args:
        max_bytes: of all merges together.
        in_flight: tells which merges are in use besides those that are pinned.
    """

    def __init__(
        self, max_bytes: int, in_flight: Callable[[], Collection[str]] = frozenset
    ) -> None:
        super().__init__(max_bytes, getsizeof=lambda merge: merge.nbytes)
        self._in_flight = in_flight
        self.evicted: list[tuple[str, CachedMerge]] = []
        self._pins: Counter[str] = Counter()

    @contextmanager
    def pinned(self, merge_id: str) -> Iterator[None]:
        """Keep a merge, present or yet to come, from eviction while the context is open."""
        self._pins[merge_id] += 1
        try:
            yield
        finally:
            self._pins[merge_id] -= 1
            if not self._pins[merge_id]:
                del self._pins[merge_id]
                if merge_id in self:
                    cachetools.Cache.__getitem__(self, merge_id).last_used = time.monotonic()

    def in_use(self, merge_id: str) -> bool:
        """Whether a merge is pinned or in flight."""
        return merge_id in self._pins or merge_id in self._in_flight()

    def snapshot(self) -> dict[str, CachedMerge]:
        """Return what it holds. Looking is not using: `items()` would reorder the LRU."""
        return {merge_id: cachetools.Cache.__getitem__(self, merge_id) for merge_id in self}

    def __setitem__(self, merge_id: str, merge: CachedMerge) -> None:
        """Store a merge, evicting the least recently used ones that are not in use.

        Raises:
            CacheFullError: it does not fit beside what is in use; nothing was evicted.
        """
        # Reading them also makes them the last used: what is evicted below is not in use.
        used = {*self._pins, *self._in_flight()} - {merge_id}
        others = [self[i].nbytes for i in used if i in self]
        if sum(others) + merge.nbytes > self.maxsize:
            raise CacheFullError
        super().__setitem__(merge_id, merge)

    def popitem(self) -> tuple[str, CachedMerge]:
        """Remove the least recently used merge, and remember it in `evicted`."""
        item = super().popitem()
        self.evicted.append(item)
        return item
