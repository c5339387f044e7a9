"""What files look like is the same while they are, and another whenever they may not be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lego_core.adapter_files import INDEX_FILE, WEIGHTS_FILE, opened
from lego_core.adapter_io import CONFIG_FILE
from vllm_lego import file_stamps
from vllm_lego.file_stamps import FilesRead, look, stamp

pytestmark = pytest.mark.usefixtures("stamped_at_once")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "a").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE):
        (folder / file).write_text("first")
    return folder


def stamped(folder: Path) -> str:
    found = stamp(look(str(folder)).mark)
    assert len(found) == 32
    return found


def test_what_is_not_read_changes_nothing(folder):
    before = look(str(folder))
    (folder / "README.md").write_text("not read")
    assert look(str(folder)) == before
    assert stamped(folder) == stamp(before.mark)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "another.safetensors"])
def test_every_file_that_is_read_counts(folder, file):
    before = look(str(folder)).mark
    (folder / file).write_text("another")
    assert look(str(folder)).mark != before
    assert stamped(folder) != stamp(before)


def test_a_write_that_leaves_size_and_mtime_as_they_were_is_noticed(folder):
    file = folder / WEIGHTS_FILE
    os.utime(file, (1, 1))
    before, status = stamped(folder), file.stat()
    while file.stat().st_ctime_ns == status.st_ctime_ns:  # the clocks of file systems tick
        with file.open("r+") as content:
            content.write("FIRST")
        os.utime(file, (1, 1))
    after = file.stat()
    for same in ("st_ino", "st_size", "st_mtime_ns"):
        assert getattr(after, same) == getattr(status, same)
    assert stamped(folder) != before


def test_files_settle_by_the_file_systems_own_time(folder, monkeypatch):
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    old = look(str(folder)).mark
    monkeypatch.setattr(file_stamps, "SETTLED_NS", 3600 * 10**9)  # no test takes so long
    young = look(str(folder)).mark
    assert (young.settled, old.settled) == (False, True)
    assert young.files == old.files
    assert stamp(young) == ""


def test_files_settle_by_the_time_of_their_content_too(folder):
    assert look(str(folder)).mark.settled
    os.utime(folder / WEIGHTS_FILE, (1 << 33, 1 << 33))
    found = look(str(folder))
    assert not found.mark.settled
    assert look(str(folder)) == found, "not read for every request for all that"


def test_file_systems_that_others_write_to_prove_nothing(folder, monkeypatch):
    monkeypatch.setattr(file_stamps, "local_devices", frozenset)
    mark = look(str(folder)).mark
    assert mark.settled
    assert stamp(mark) == ""


def test_what_is_not_there_has_none(tmp_path):
    mark = look(str(tmp_path / "a")).mark
    assert mark is None
    assert stamp(mark) == ""


def test_it_tells_the_devices_of_the_files_and_of_the_folder(tmp_path):
    """The files may all be links to another."""
    assert look(str(tmp_path)).devices == {tmp_path.stat().st_dev}
    elsewhere = next(p for p in (Path("/proc/version"), Path("/dev/null")) if p.exists())
    (tmp_path / WEIGHTS_FILE).symlink_to(elsewhere)
    devices = {tmp_path.stat().st_dev, elsewhere.stat().st_dev}
    assert look(str(tmp_path)).devices == devices
    assert len(devices) == 2


def test_what_is_read_is_what_was_seen_unless_it_changes(folder):
    def read(*during: str) -> bool:
        found = FilesRead()
        with opened(folder, WEIGHTS_FILE, "a", found.note) as content:
            content.read()
            for text in during:
                (folder / WEIGHTS_FILE).write_text(text)
        return found.are(mark)

    mark = look(str(folder)).mark
    assert read()
    assert not read("longer than before")
    assert not read(), "it is another from now on"
    assert not FilesRead().are(None)


def test_shards_are_not_what_was_seen_where_one_file_is_there(folder):
    """It wins: the same files would be read, had it not been away for a moment."""
    mark = look(str(folder)).mark
    found = FilesRead()
    for file in (CONFIG_FILE, INDEX_FILE):
        with opened(folder, file, "a", found.note):
            pass
    assert not found.are(mark)
    (folder / WEIGHTS_FILE).unlink()
    assert found.are(look(str(folder)).mark)
