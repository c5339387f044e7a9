"""What files look like is the same while they are, and another whenever they may not be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lego_core.adapter_files import INDEX_FILE, WEIGHTS_FILE
from lego_core.adapter_io import CONFIG_FILE
from vllm_lego import file_stamps
from vllm_lego.file_stamps import look, stamp


@pytest.fixture(autouse=True)
def _settled_at_once_and_local(monkeypatch):
    monkeypatch.setattr(file_stamps, "SETTLED_NS", 0)
    monkeypatch.setattr(file_stamps, "are_local", lambda _: True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "a").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE):
        (folder / file).write_text("first")
    return folder


def stamped(folder: Path) -> str:
    found = stamp(look(str(folder)))
    assert len(found) == 32
    return found


def test_what_is_not_read_changes_nothing(folder):
    before = look(str(folder))
    (folder / "README.md").write_text("not read")
    assert look(str(folder)) == before
    assert stamped(folder) == stamp(before)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "another.safetensors"])
def test_every_file_that_is_read_counts(folder, file):
    before = look(str(folder))
    (folder / file).write_text("another")
    assert look(str(folder)).mark != before.mark
    assert stamped(folder) != stamp(before)


def test_a_write_that_leaves_size_and_mtime_as_they_were_is_noticed(folder):
    file = folder / WEIGHTS_FILE
    os.utime(file, (1, 1))
    before, status = stamped(folder), file.stat()
    with file.open("r+") as content:
        content.write("FIRST")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = file.stat()
    for same in ("st_ino", "st_size", "st_mtime_ns"):
        assert getattr(after, same) == getattr(status, same)
    assert stamped(folder) != before


@pytest.mark.parametrize("mtime", [1, 1 << 33])
def test_files_settle_by_the_file_systems_own_time(folder, monkeypatch, mtime):
    for file in folder.iterdir():
        os.utime(file, (mtime, mtime))
    old = look(str(folder))
    monkeypatch.setattr(file_stamps, "SETTLED_NS", 3600 * 10**9)  # no test takes so long
    young = look(str(folder))
    assert (young.mark.settled, old.mark.settled) == (False, True)
    assert young.mark.files == old.mark.files
    assert stamp(young) == ""


def test_files_settle_by_the_time_of_their_content_too(folder, monkeypatch):
    monkeypatch.setattr(file_stamps, "SETTLED_NS", 1)
    now = 1_000_000 * 10**9
    monkeypatch.setattr("time.time_ns", lambda: now)  # long before all ctimes
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    assert look(str(folder)).mark.settled
    os.utime(folder / WEIGHTS_FILE, ns=(now, now))
    assert not look(str(folder)).mark.settled


def test_file_systems_that_others_write_to_prove_nothing(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(file_stamps, "are_local", asked.append)
    seen = look(str(folder))
    assert stamp(seen) == ""
    assert asked == [seen.devices] == [{folder.stat().st_dev}]


def test_what_is_not_there_has_none(tmp_path):
    seen = look(str(tmp_path / "a"))
    assert seen.mark is None
    assert stamp(seen) == ""


def test_it_tells_the_devices_of_the_files_and_of_the_folder(tmp_path):
    """The files may all be links to another."""
    assert look(str(tmp_path)).devices == {tmp_path.stat().st_dev}
    elsewhere = next(p for p in (Path("/proc/version"), Path("/dev/null")) if p.exists())
    (tmp_path / WEIGHTS_FILE).symlink_to(elsewhere)
    devices = {tmp_path.stat().st_dev, elsewhere.stat().st_dev}
    assert look(str(tmp_path)).devices == devices
    assert len(devices) == 2
