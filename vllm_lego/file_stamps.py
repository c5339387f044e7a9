"""What an adapter's files look like: while that is the same they are taken to hold what they held.

The front end goes by it for every request. A stamp tells workers what it was when the front end
hashed the files. Adapters are to be replaced by renaming: the times of a file that is written in place
tell when a write began, and of one that is mapped into a writer's memory not even that.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Hashable
from typing import NamedTuple

from lego_core.adapter_io import CONFIG_FILE, WEIGHTS_FILE
from vllm_lego.looks import Seen, local_devices

SETTLED_NS = 2_000_000_000
"""A write may go on for so long after the time that it leaves, and clocks of file systems stand still."""

_HEX_DIGITS = 32


class File(NamedTuple):
    """What one file looks like; times in nanoseconds."""

    name: str
    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> File:
        """Take what matters from what `stat` or `fstat` says of it."""
        return cls(
            name,
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class FilesMark(NamedTuple):
    """What changes whenever files do, and once more when they have been left alone for a while.

    So what was read while somebody wrote is read again.

    Attributes:
        settled: whether the last change is longer ago than `SETTLED_NS`.
        files: all that are read, or may be, by name.
    """

    settled: bool
    files: tuple[File, ...]

    def are_local(self) -> bool:
        """Whether they lie on file systems that nobody else writes to. Reads what is mounted."""
        return {file.device for file in self.files} <= local_devices()


class FilesRead:
    """What files look like when they have been read: `note` is for `lego_core` to `observe` them."""

    def __init__(self) -> None:
        self._files: set[File] = set()

    def note(self, name: str, status: os.stat_result) -> None:
        """Add what `fstat` says of one."""
        self._files.add(File.of(name, status))

    def are(self, mark: Hashable) -> bool:
        """Whether those were read that had been seen, and none of them has changed since."""
        if not isinstance(mark, FilesMark) or not self._files <= set(mark.files):
            return False
        read, seen = ({file.name for file in files} for files in (self._files, mark.files))
        return WEIGHTS_FILE in read or WEIGHTS_FILE not in seen  # it wins over shards


def is_read(file: str) -> bool:
    """Whether a file of this name in an adapter's folder is read, or may be."""
    return file == CONFIG_FILE or ".safetensors" in file


def look(path: str) -> Seen:
    """See what an adapter's files look like, shards and their index too. The mark is a `FilesMark`."""
    now = time.time_ns()
    try:
        with os.scandir(path) as files:
            seen = sorted(File.of(f.name, f.stat()) for f in files if is_read(f.name))
        own = os.stat(path)  # noqa: PTH116  the event loop waits for this, and pathlib takes a multiple
    except OSError:
        return Seen()
    # A program may set mtime as it likes; ctime is the file system's own.
    settled = all(max(file.mtime, file.ctime) < now - SETTLED_NS for file in seen)
    devices = frozenset([own.st_dev, *(file.device for file in seen)])
    return Seen(FilesMark(settled, tuple(seen)), devices)


def stamp(mark: Hashable) -> str:
    """Return 32 hex digits for files that were seen, for another process to compare.

    Empty if equal ones would prove nothing: the files have not settled, or lie on a file system that may
    answer from what it remembers of another host's.
    """
    if not isinstance(mark, FilesMark) or not mark.settled or not mark.are_local():
        return ""
    return hashlib.sha256(repr(mark.files).encode()).hexdigest()[:_HEX_DIGITS]
