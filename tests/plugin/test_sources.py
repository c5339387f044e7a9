"""Names that a folder and the hub give: what is an adapter, what is not, and when that is known."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import WEIGHTS_FILE
from tests.hub_server import plain
from vllm_lego.catalog import Catalog
from vllm_lego.errors import UnknownAdapterError
from vllm_lego.looks import SHARED_S
from vllm_lego.settings import SettingsError
from vllm_lego.sources import AdapterFolder, HubAdapters, HubAllowList

LIMIT = 1 << 20


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file, content in plain().items():
        (folder / file).write_bytes(content)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    adapter(folder / "sql")
    return folder


def names(folder: AdapterFolder) -> list[str]:
    asyncio.run(folder.refresh())
    return sorted(folder.adapters)


def until(condition: Callable[[], bool], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end


def test_those_who_ask_together_share_a_look(home, monkeypatch):
    folder, looks = AdapterFolder(home), []
    stock = folder._refresh
    monkeypatch.setattr(folder, "_refresh", lambda look: (looks.append(look), stock(look)))

    async def ask() -> None:
        await asyncio.gather(*(folder.refresh() for _ in range(100)))

    asyncio.run(ask())
    assert 1 <= len(looks) < 50
    adapter(home / "new")
    assert names(folder) == ["new", "sql"]


def test_a_quick_look_leaves_subfolders_to_a_thorough_one(home, monkeypatch):
    (home / "later").mkdir()
    folder = AdapterFolder(home)
    os.utime(home, (1, 1))  # a folder that has just changed is looked through in any case
    names(folder)
    for file, content in plain().items():
        (home / "later" / file).write_bytes(content)
    monkeypatch.setattr("vllm_lego.sources._FRESH_S", 0.0)
    asyncio.run(folder.refresh(thorough=False))
    assert sorted(folder.adapters) == ["sql"]
    assert names(folder) == ["later", "sql"]


def test_folders_come_and_go_at_once(home):
    folder = AdapterFolder(home)
    for i in range(20):  # within one tick of the file system's clock, too
        adapter(home.with_name("new")).rename(home / f"n{i}")
        assert f"n{i}" in names(folder)
    for i in range(20):
        (home / f"n{i}").rename(home.with_name(f"gone{i}"))
        assert f"n{i}" not in names(folder)
    assert names(folder) == ["sql"]
    assert folder.adapters["sql"] == str(home.resolve() / "sql")


def test_a_configuration_written_later_is_noticed_soon(home):
    folder = AdapterFolder(home)
    (home / "late").mkdir()
    assert names(folder) == ["sql"]
    (home / "late" / CONFIG_FILE).write_text("{}")
    until(lambda: names(folder) == ["late", "sql"], 5)


def test_a_look_at_an_unchanged_folder_is_one_stat(home, monkeypatch):
    folder = AdapterFolder(home)
    until(lambda: time.time_ns() - home.stat().st_mtime_ns > 50_000_000)
    names(folder)
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("scanned"))
    monkeypatch.setattr("vllm_lego.sources._FRESH_S", 1000)
    for _ in range(100):
        assert names(folder) == ["sql"]


def test_looks_that_need_not_be_thorough_are_shared_for_a_while(home, monkeypatch):
    looks = []
    look = AdapterFolder._refresh
    monkeypatch.setattr("vllm_lego.sources.SHARED_S", 1000.0)
    monkeypatch.setattr(
        AdapterFolder, "_refresh", lambda folder, of: (looks.append(of.thorough), look(folder, of))
    )
    folder = AdapterFolder(home)

    async def scenario():
        for _ in range(2):
            await asyncio.gather(*(folder.refresh(thorough=False) for _ in range(64)))
        await folder.refresh()
        await folder.refresh(thorough=False)

    asyncio.run(scenario())
    assert looks == [False, True]


def test_a_look_that_fails_fails_for_all_who_share_it(home, monkeypatch):
    def fail(_: AdapterFolder, look: Any) -> None:
        look.begun = True
        raise RuntimeError("broken")

    monkeypatch.setattr("vllm_lego.sources.SHARED_S", 1000.0)
    folder = AdapterFolder(home)
    monkeypatch.setattr(AdapterFolder, "_refresh", fail)

    async def scenario():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                await folder.refresh(thorough=False)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [".hidden", "a\nb", "a\x7fb", "lego-0123456789abcdef", "a\u2028b"])
def test_names_that_are_none(home, name):
    adapter(home / name)
    assert names(AdapterFolder(home)) == ["sql"]


def test_a_name_that_is_no_unicode(home):
    os.mkdir(os.fsencode(home) + b"/\xff")  # noqa: PTH102  a Path would have to be decoded
    Path(os.fsdecode(os.fsencode(home) + b"/\xff"), CONFIG_FILE).write_text("{}")
    assert names(AdapterFolder(home)) == ["sql"]


@pytest.mark.parametrize("name", ["a b", "c++", "été", "日本語", "a@b", "a,b", ".x"])
def test_names_that_are_some(home, name):
    adapter(home / name)
    assert (name in names(AdapterFolder(home))) is not name.startswith(".")


def test_what_is_no_adapter(home):
    (home / "empty").mkdir()
    (home / "file").write_text("{}")
    (home / "folder" / CONFIG_FILE).mkdir(parents=True)
    (home / "pipe").mkdir()
    os.mkfifo(home / "pipe" / CONFIG_FILE)
    (home / "nested" / "deeper").mkdir(parents=True)
    (home / "nested" / "deeper" / CONFIG_FILE).write_text("{}")
    (home / "dangling").symlink_to("nowhere")
    assert names(AdapterFolder(home)) == ["sql"]


def test_links_that_stay_inside(home, tmp_path):
    (home / "latest").symlink_to("sql")
    (home / "absolute").symlink_to(home / "sql")
    adapter(home / "own")
    (home / "own" / WEIGHTS_FILE).rename(home / "own" / "v2.safetensors")
    (home / "own" / WEIGHTS_FILE).symlink_to("v2.safetensors")
    (tmp_path / "link").symlink_to(home)
    assert names(AdapterFolder(tmp_path / "link")) == ["absolute", "latest", "own", "sql"]


def test_links_that_lead_out(home, tmp_path, caplog):
    outside = adapter(tmp_path / "outside")
    (home / "folder").symlink_to(outside)
    (home / "up").symlink_to("..")
    (home / "itself").symlink_to(".")
    (home / CONFIG_FILE).write_text("{}")
    for file in (CONFIG_FILE, WEIGHTS_FILE, "adapter_model-1.safetensors"):
        folder = adapter(home / f"with-{file}")
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(outside / file)
    (outside / "adapter_model-1.safetensors").write_bytes(b"")
    adapter(home / "neighbour")
    (home / "neighbour" / WEIGHTS_FILE).unlink()
    (home / "neighbour" / WEIGHTS_FILE).symlink_to(home / "sql" / WEIGHTS_FILE)
    (tmp_path / "home2").mkdir()  # begins like home
    (home / "sibling").symlink_to(adapter(tmp_path / "home2" / "x"))
    folder = AdapterFolder(home)
    assert names(folder) == ["sql"]
    names(folder)
    told = [record.message for record in caplog.records if "with-" in record.message]
    assert len(told) == 3  # once each


@pytest.mark.parametrize(
    ("one", "other"), [("SQL", "sql"), ("Straße", "STRASSE"), ("é", "e\u0301")]
)
def test_names_that_a_volume_may_take_for_one_are_nobodys(home, caplog, one, other):
    (home / "sql").rename(home / "kept")
    adapter(home / one)
    assert one in names(AdapterFolder(home))
    try:
        adapter(home / other)
    except FileExistsError:
        pytest.skip("this volume takes them for one")
    folder = AdapterFolder(home)
    assert names(folder) == ["kept"]
    assert "rename all but one" in caplog.text


def test_a_folder_that_is_not_there(tmp_path, home):
    with pytest.raises(SettingsError, match="VLLM_LEGO_ADAPTER_DIR"):
        AdapterFolder(tmp_path / "none")
    folder = AdapterFolder(home)
    home.rename(tmp_path / "moved")
    assert names(folder) == []
    (tmp_path / "moved").rename(home)
    assert names(folder) == ["sql"]


def looked_up(catalog: Catalog, *wanted: str) -> list[str]:
    return [e.path for e in asyncio.run(catalog.look_up(wanted, param="adapters"))]


def test_a_folders_adapters_are_in_the_catalog_and_vllms_names_win(home, tmp_path, caplog):
    adapter(home / "style")
    adapter(home / "base")
    served = {"style": str(adapter(tmp_path / "served"))}
    catalog = Catalog(served, AdapterFolder(home), is_base_model=lambda name: name == "base")
    assert looked_up(catalog, "sql", "style") == [str(home / "sql"), served["style"]]
    assert catalog.names() == ["sql", "style"]
    assert catalog.folder_names() == ["sql"]
    assert "base" not in catalog
    assert caplog.text.count("'style'") == 1
    adapter(home / "new")
    assert looked_up(catalog, "new") == [str(home / "new")]


def test_an_adapter_that_goes_is_unknown(home):
    catalog = Catalog({}, AdapterFolder(home))
    assert looked_up(catalog, "sql")
    (home / "sql").rename(home.with_name("gone"))
    time.sleep(SHARED_S)  # requests may share a look for so long
    with pytest.raises(UnknownAdapterError, match="'sql' is not served here"):
        looked_up(catalog, "sql")


HOSTILE = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from(["..", ".", "/", "sql", "\0", "home", "org", "@", "\\", "~"])).map(
        "".join
    ),
    st.sampled_from(
        ["", "sql/", "./sql", "../home/sql", "sql\0", "SQL", "s\u0301ql", "sql" * 100_000]
    ),
)


OPENED: list[str] | None = None
"""Where the file system or the network is touched, while somebody wants to know."""


@sys.addaudithook
def _note(event: str, args: Any) -> None:
    if OPENED is not None and event in ("open", "os.scandir", "os.listdir", "socket.connect"):
        OPENED.append(str(args[0]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("small")
    adapter(home / "sql")
    return home


@settings(deadline=None)
@given(name=HOSTILE.filter(lambda name: name != "sql"))
def test_a_name_that_is_not_known_reaches_nothing(small, name):
    """Neither the file system, but for the look at the folder itself, nor the hub."""
    global OPENED  # noqa: PLW0603
    catalog = Catalog({}, AdapterFolder(small), HubAdapters(HubAllowList.parse("org/x"), LIMIT))
    OPENED = []
    try:
        with pytest.raises(UnknownAdapterError) as caught:
            looked_up(catalog, name)
        assert len(str(caught.value)) < 200
        assert {place for place in OPENED if "/dev/" not in place} <= {
            str(small),
            str(small / "sql"),
        }
    finally:
        OPENED = None


def test_a_description_is_of_the_files(home):
    (entry,) = asyncio.run(Catalog({}, AdapterFolder(home)).look_up(["sql"], param="adapters"))
    assert (entry.name, entry.max_rank, entry.config.alpha) == ("sql", 2, 4)
    config = json.loads((home / "sql" / CONFIG_FILE).read_text()) | {"rank_pattern": {"q_proj": 3}}
    (home / "sql" / CONFIG_FILE).write_text(json.dumps(config))
    (entry,) = asyncio.run(Catalog({}, AdapterFolder(home)).look_up(["sql"], param="adapters"))
    assert entry.max_rank == 3
