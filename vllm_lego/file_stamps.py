"""What an adapter's files look like: while that is the same they are taken to hold what they held.

The front end goes by it for every request. A stamp tells workers what it was when the front end had
hashed the files. Adapters are to be replaced by renaming: the times of a file that is written in place tell when
a write began, and of one that is mapped into a writer's memory not even that.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import NamedTuple

from lego_core.adapter_io import CONFIG_FILE
from vllm_lego.looks import Seen, are_local

SETTLED_NS = 2_000_000_000
"""A write may last for so long after the time that it leaves, on clocks that stand still for a second."""

_HEX_DIGITS = 32


class FilesMark(NamedTuple):
    """What changes whenever files do, and once more when they have been left alone for a while.

    So what was read while somebody wrote is read again.

    Attributes:
        settled: whether the last change is longer ago than `SETTLED_NS`.
        files: name, device, inode, size, mtime and ctime of each that is read, in order.
    """

    settled: bool
    files: tuple[tuple[str, int, int, int, int, int], ...]


def is_read(file: str) -> bool:
    """Whether a file of this name in an adapter's folder is read, or may be."""
    return file == CONFIG_FILE or ".safetensors" in file


def look(path: str) -> Seen:
    """See what an adapter's files look like, shards and their index too. The mark is a `FilesMark`."""
    now = time.time_ns()
    try:
        with os.scandir(path) as files:
            stats = [(file.name, file.stat()) for file in files if is_read(file.name)]
        own = os.stat(path)  # noqa: PTH116  the event loop waits for this, and pathlib takes a multiple
    except OSError:
        return Seen()
    # A program may set mtime as it likes; ctime is the file system's own.
    settled = all(
        abs(now - changed) > SETTLED_NS
        for _, s in stats
        for changed in (s.st_mtime_ns, s.st_ctime_ns)
    )
    seen = sorted(
        (name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats
    )
    devices = frozenset([own.st_dev, *(s.st_dev for _, s in stats)])
    return Seen(FilesMark(settled, tuple(seen)), devices)


def stamp(seen: Seen) -> str:
    """Return 32 hex digits for files that were seen, for another process to compare.

    Empty if equal ones would prove nothing: the files have not settled, or lie on a file system that may
    answer from what it remembers of another host's.
    """
    mark = seen.mark
    if not isinstance(mark, FilesMark) or not mark.settled or not are_local(seen.devices):
        return ""
    return hashlib.sha256(repr(mark.files).encode()).hexdigest()[:_HEX_DIGITS]
