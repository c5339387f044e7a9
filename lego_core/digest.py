"""SHA-256 of what is too large for one thread: of blocks, and then of their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

BLOCK_BYTES = 4 << 20
_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))


class Digest:
    """A tree of one level: SHA-256 over the SHA-256s of blocks of `BLOCK_BYTES`, and the length.

    Fed in pieces of any size, as one of hashlib's. A piece of several blocks is hashed by several
    threads, and the last block may be shorter than the others.
    """

    def __init__(self) -> None:
        self._blocks = hashlib.sha256()
        self._last = hashlib.sha256()
        self._last_bytes = 0
        self._size = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        if self._last_bytes:
            view = self._extend_last(view)
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        for found in _hashed([view[i : i + BLOCK_BYTES] for i in range(0, whole, BLOCK_BYTES)]):
            self._blocks.update(found)
        self._extend_last(view[whole:])

    def hexdigest(self) -> str:
        """Return 64 hex digits for what was added until now."""
        tree = self._blocks.copy()
        tree.update(self._last.digest() + self._size.to_bytes(8, "big"))
        return tree.hexdigest()

    def _extend_last(self, view: memoryview) -> memoryview:
        """Add to the last block, and close it when it is full. Returns what is left."""
        part = view[: BLOCK_BYTES - self._last_bytes]
        self._last.update(part)
        self._last_bytes += len(part)
        if self._last_bytes == BLOCK_BYTES:
            self._blocks.update(self._last.digest())
            self._last, self._last_bytes = hashlib.sha256(), 0
        return view[len(part) :]


def _hashed(blocks: Sequence[memoryview]) -> Iterable[bytes]:
    return map(_hash, blocks) if len(blocks) < 2 or _THREADS < 2 else _threads().map(_hash, blocks)


def _hash(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()  # lets other threads run meanwhile


@cache
def _threads() -> ThreadPoolExecutor:
    """Return the threads, made by their first user, whose priority they inherit on Linux."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="lego-hashing")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of them
