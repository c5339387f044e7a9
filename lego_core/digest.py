"""A digest of what is too large for one thread: SHA-256 of blocks, and then of their hashes."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import BinaryIO

BLOCK_BYTES = 4 << 20
"""Part of every digest: another size gives adapters, and so merges, other names."""

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_THREADS = max(1, min(8, _CORES // 2))


class Digest:
    """A tree of one level: SHA-256 over a prefix, the SHA-256s of blocks, and the length.

    Fed in pieces of any size, as one of hashlib's. A piece of several blocks is hashed by several
    threads. All blocks have `BLOCK_BYTES` but the last, which may be shorter or empty.

    Args:
        prefix: what the digest is of besides; it shifts no block.
    """

    def __init__(self, prefix: bytes = b"") -> None:
        self._tree = hashlib.sha256(len(prefix).to_bytes(8, "big") + prefix)
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
        for found in [_hashing(view[i : i + BLOCK_BYTES]) for i in range(0, whole, BLOCK_BYTES)]:
            self._tree.update(found())
        self._extend_last(view[whole:])

    def take(self, content: BinaryIO, size: int, memory: memoryview | None = None) -> int:
        """Read a part of a file and add it; other threads hash while this one reads.

        Args:
            content: the file, unbuffered, where the part begins.
            size: of the part, in bytes.
            memory: where to put it, of that size; by default it is not kept.

        Returns:
            How many bytes there were: fewer if the file ends before.

        Raises:
            OSError: the file could not be read; this digest is of no use any more.
        """
        taken, complete = 0, True
        hashing: deque[tuple[memoryview, Callable[[], bytes]]] = deque()
        spare: list[memoryview] = []  # hashed; new memory costs as much as reading into it
        while complete and taken < size:
            room = min(size - taken, BLOCK_BYTES - self._last_bytes)
            if memory is not None:
                piece = memory[taken : taken + room]
            elif spare:
                piece = spare.pop()[:room]
            else:
                piece = memoryview(bytearray(room))
            count = fill(content, piece)
            taken, complete = taken + count, count == room
            if count < BLOCK_BYTES:  # the first may complete a block, the last does not
                self._extend_last(piece[:count])
                continue
            hashing.append((piece, _hashing(piece)))
            if len(hashing) > _THREADS:
                block, found = hashing.popleft()
                self._tree.update(found())
                if memory is None:
                    spare.append(block)
        for _, found in hashing:
            self._tree.update(found())
        self._size += taken
        return taken

    def hexdigest(self) -> str:
        """Return 64 hex digits for what was added until now."""
        tree = self._tree.copy()
        tree.update(self._last.digest() + self._size.to_bytes(8, "big"))
        return tree.hexdigest()

    def _extend_last(self, view: memoryview) -> memoryview:
        """Add to the last block, and close it when it is full. Returns what is left."""
        part = view[: BLOCK_BYTES - self._last_bytes]
        self._last.update(part)
        self._last_bytes += len(part)
        if self._last_bytes == BLOCK_BYTES:
            self._tree.update(self._last.digest())
            self._last, self._last_bytes = hashlib.sha256(), 0
        return view[len(part) :]


class Unhashed:
    """What reads as a `Digest` does, and hashes nothing.

    Args:
        digest: what is known to be the digest, or what stands for one that nobody asks for.
    """

    def __init__(self, digest: str = "") -> None:
        self._digest = digest

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add nothing."""

    def take(self, content: BinaryIO, size: int, memory: memoryview | None = None) -> int:
        """Read a part of a file; what is not kept is skipped. See `Digest.take`."""
        if memory is not None:
            return fill(content, memory)
        content.seek(size, os.SEEK_CUR)
        return size

    def hexdigest(self) -> str:
        """Return what it was given."""
        return self._digest


def fill(content: BinaryIO, view: memoryview) -> int:
    """Read from a file until the view is full or the file ends. Returns the bytes read."""
    filled = 0
    while filled < len(view):
        count = content.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return filled


def _hashing(block: memoryview) -> Callable[[], bytes]:
    """Begin to hash a block that stays as it is. Returns what waits for its hash."""
    if _THREADS > 1:
        with suppress(RuntimeError):  # the process ends, or may have no more threads
            return _threads().submit(_hash, block).result
    found = _hash(block)
    return lambda: found


def _hash(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()  # lets other threads run meanwhile


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="lego-hashing")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of them
