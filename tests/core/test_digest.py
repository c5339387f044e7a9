"""The digest of content: against one formed in one go, for any pieces, by several threads."""

from __future__ import annotations

import hashlib
import io
import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lego_core import digest
from lego_core.digest import Digest

BLOCK = 7


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(digest, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(digest, "_THREADS", 4)


def reference(content: bytes, prefix: bytes = b"") -> str:
    whole = len(content) // BLOCK * BLOCK
    blocks = [content[i : i + BLOCK] for i in range(0, whole, BLOCK)] + [content[whole:]]
    hashes = b"".join(hashlib.sha256(block).digest() for block in blocks)
    framed = len(prefix).to_bytes(8, "big") + prefix
    return hashlib.sha256(framed + hashes + len(content).to_bytes(8, "big")).hexdigest()


def digested(pieces: list[bytes], prefix: bytes = b"") -> str:
    found = Digest(prefix)
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


@given(st.lists(st.binary(max_size=5 * BLOCK), max_size=8), st.binary(max_size=2 * BLOCK))
def test_pieces_of_any_size_have_the_digest_of_the_whole(pieces, prefix):
    assert digested(pieces, prefix) == reference(b"".join(pieces), prefix)


@given(
    st.binary(max_size=2 * BLOCK), st.binary(max_size=30 * BLOCK), st.integers(0, 30), st.booleans()
)
def test_a_part_of_a_file_is_as_if_it_were_added(before, content, missing, kept):
    found = Digest()
    found.update(before)
    file = io.BytesIO(b"start" + content)
    file.seek(5)
    memory = bytearray(len(content) + missing)
    room = memoryview(memory) if kept else None
    assert found.take(file, len(content) + missing, room) == len(content)
    assert not kept or memory == content + bytes(missing)
    found.update(b"end")
    assert found.hexdigest() == reference(before + content + b"end")


class Slow(io.BytesIO):
    """A file that gives at most three bytes at a time, and an error where it is said to."""

    fails_at = -1

    def readinto(self, buffer) -> int:
        if self.tell() == self.fails_at:
            raise OSError("gone")
        return super().readinto(memoryview(buffer)[:3])


def test_a_block_is_used_again_only_when_it_has_been_hashed(monkeypatch):
    def hashing(block):  # not before somebody asks
        return lambda: hashlib.sha256(block).digest()

    monkeypatch.setattr(digest, "_hashing", hashing)
    content = bytes(range(30 * BLOCK + 3))
    found = Digest()
    found.update(b"end")
    assert found.take(io.BytesIO(content), len(content)) == len(content)
    assert found.hexdigest() == reference(b"end" + content)


def test_a_file_that_gives_little_at_a_time():
    content = bytes(range(12 * BLOCK + 3))
    found, memory = Digest(), bytearray(len(content))
    assert found.take(Slow(content), len(content), memoryview(memory)) == len(content)
    assert memory == content
    assert found.hexdigest() == reference(content)


def test_an_error_of_the_file_is_told_and_the_memory_let_go():
    file, memory = Slow(bytes(12 * BLOCK)), bytearray(12 * BLOCK)
    file.fails_at = 9 * BLOCK + 3
    with pytest.raises(OSError, match="gone"):
        Digest().take(file, 12 * BLOCK, memoryview(memory))
    digest._threads().shutdown()  # they have hashed what they were given
    digest._threads.cache_clear()
    memory.clear()  # a BufferError where anybody still looks at it


def test_a_part_of_a_file_ends_where_it_is_said_to():
    file = io.BytesIO(b"x" * (20 * BLOCK))
    found = Digest()
    assert found.take(file, 12 * BLOCK + 3) == file.tell() == 12 * BLOCK + 3
    assert found.hexdigest() == reference(b"x" * (12 * BLOCK + 3))


def test_digests_stay_what_they_are(monkeypatch):
    """Names of adapters and merges follow them."""
    monkeypatch.undo()
    content = bytes(range(256)) * (9 << 12)  # 9 MiB: two blocks and a quarter
    assert digested([content], b"prefix") == (
        "031f392032583735873eadf15354e952f60602a9118017aacfd18a1f4e617bdc"
    )


def test_without_threads_the_calling_one_hashes(monkeypatch):
    def none_left() -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(digest, "_threads", none_left)
    content = b"x" * (9 * BLOCK + 1)
    assert digested([content]) == reference(content)
    found = Digest()
    found.take(io.BytesIO(content), len(content))
    assert found.hexdigest() == reference(content)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK, 9 * BLOCK + 3])
def test_bytes_in_other_places_have_another_digest(size):
    content = bytes(range(size))
    others = {content[::-1], content + b"\0", b"\0" + content, content[BLOCK:] + content[:BLOCK]}
    for other in others - {content}:
        assert digested([other]) != digested([content])


def test_asking_in_between_changes_nothing():
    found = Digest()
    found.update(b"x" * (2 * BLOCK + 3))
    assert found.hexdigest() == found.hexdigest() == reference(b"x" * (2 * BLOCK + 3))
    found.update(b"y" * BLOCK)
    assert found.hexdigest() == reference(b"x" * (2 * BLOCK + 3) + b"y" * BLOCK)


def test_a_forked_process_has_threads_of_its_own():
    content = b"x" * (9 * BLOCK)
    expected = digested([content])  # its threads are here now
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sending.send(digested([content])))
    child.start()
    try:
        assert receiving.poll(30)
        assert receiving.recv() == expected
    finally:
        child.kill()
        child.join()
