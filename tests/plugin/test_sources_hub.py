"""Adapters of the hub: what may be named, what is fetched, and what a hub that lies is worth."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import WEIGHTS_FILE
from tests.hub_server import NEW, OLD, REPO, Hub, plain
from tests.plugin.test_sources import LIMIT, adapter, looked_up
from vllm_lego.access import Access
from vllm_lego.catalog import Catalog
from vllm_lego.errors import (
    BusyError,
    ForbiddenError,
    HubFailedError,
    ServingError,
    UnknownAdapterError,
    UnmergeableError,
)
from vllm_lego.policy import Policy
from vllm_lego.settings import Settings, SettingsError
from vllm_lego.sources import AdapterFolder, HubAdapters, HubAllowList


def allow(text: str) -> HubAllowList:
    return HubAllowList.parse(text)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("allowed", "name", "found"),
    [
        ("org/a", "org/a", ("org/a", None)),
        ("org/a", "org/a@v1.0", ("org/a", "v1.0")),
        ("x/y, org/a\n", "org/a", ("org/a", None)),
        ("org/*", "org/a", ("org/a", None)),
        ("org/*", "org/a@main", ("org/a", "main")),
        ("org/a@v1", "org/a@v1", ("org/a", "v1")),
        ("org/a@v1", "org/a", ("org/a", "v1")),
        (f"org/a@{COMMIT}", "org/a", ("org/a", COMMIT)),
        (f"org/a@{COMMIT}", f"org/a@{COMMIT}", ("org/a", COMMIT)),
        (f"org/a@{COMMIT} org/*", "org/a", ("org/a", COMMIT)),
        ("org/a org/a@refs/pr/1", "org/a@refs/pr/1", ("org/a", "refs/pr/1")),
        ("org/a org/a@v1", "org/a", ("org/a", None)),
        # What nobody allowed.
        ("", "org/a", None),
        ("org/a", "org/b", None),
        ("org/a", "ORG/a", None),
        ("org/*", "org2/a", None),
        ("org/*", "org/", None),
        ("org/*", "org/a/b", None),
        ("org/*", "org/..", None),
        ("org/*", "org/a--b", None),
        ("org/*", "org/" + "a" * 97, None),
        ("org/*", "org/*", None),
        ("org/a@v1", "org/a@v2", None),
        ("org/a@v1 org/*", "org/a@v2", None),
        ("org/a@v1 org/a@v2", "org/a", None),
        # Anybody can propose changes, and the hub serves them under the repository's name.
        ("org/a", "org/a@refs/pr/1", None),
        ("org/a", "org/a@pr/1", None),
        ("org/*", f"org/a@{COMMIT}", None),
        ("org/a", f"org/a@{COMMIT[:7].upper()}", None),
        ("org/a", "org/a@abcd12", None),
        ("org/a", "org/a@v1-0-gabcd12", None),
        ("org/a", "org/a@", None),
        ("org/a", "org/a@main@v1", None),
        ("org/a", "org/a@main\n", None),
        ("org/a", "org/a@main~1", None),
        ("org/a", "org/a@\u0661", None),
    ],
)
def test_what_may_be_named_of_the_hub(allowed, name, found):
    assert allow(allowed).find(name) == found


@given(st.text(max_size=50))
def test_nothing_else_may_be_named(name):
    assert allow("").find(name) is None
    found = allow("org/*, x/y").find(name)
    assert found is None or found[0].startswith("org/") or found[0] == "x/y"


@pytest.mark.parametrize(
    "entry", ["*", "org", "*/*", "*/a", "org/a*", "org/a@", "/a", "org/a/b", "@v1"]
)
def test_an_entry_that_is_none_is_refused(entry):
    with pytest.raises(SettingsError, match="VLLM_LEGO_HUB_ALLOW") as caught:
        allow(f"org/a {entry}")
    assert repr(entry) in str(caught.value)


def hub_catalog(allowed: str = "org/*", max_bytes: int = LIMIT) -> Catalog:
    return Catalog({}, hub=HubAdapters(allow(allowed), max_bytes))


def refused(catalog: Catalog, error: type[ServingError], name: str = REPO) -> str:
    with pytest.raises(error) as caught:
        looked_up(catalog, name)
    assert type(caught.value) is error
    assert name in str(caught.value)
    assert "/tmp" not in str(caught.value)  # noqa: S108  no path of this server
    return str(caught.value)


def test_an_adapter_comes_from_the_hub_once_and_stays_at_its_commit(hub: Hub):
    hub.push(OLD, plain(0))
    catalog = hub_catalog()
    first = looked_up(catalog, REPO)
    assert OLD in first[0]
    asked = len(hub.asked)
    hub.push(NEW, plain(1))
    assert looked_up(catalog, REPO) == first
    assert len(hub.asked) == asked
    assert NEW in looked_up(hub_catalog(), REPO)[0]  # after a restart
    assert catalog.names() == [REPO]


def test_a_pin_is_what_is_served(hub: Hub):
    hub.push(OLD, plain(0))
    hub.push(NEW, plain(1))
    assert OLD in looked_up(hub_catalog(f"{REPO}@{OLD}"), REPO)[0]


def test_a_cache_that_somebody_emptied_is_filled_with_the_same_commit(hub: Hub):
    hub.push(OLD, plain(0))
    catalog = hub_catalog()
    (folder,) = looked_up(catalog, REPO)
    hub.push(NEW, plain(1))
    for file in Path(folder).iterdir():
        file.unlink()
    assert looked_up(catalog, REPO) == [folder]


def test_nothing_is_fetched_that_is_not_allowed(hub: Hub):
    hub.push(OLD, plain())
    for catalog in (Catalog({}), hub_catalog("other/*"), hub_catalog("org/sq")):
        assert refused(catalog, UnknownAdapterError) == f"adapter {REPO!r} is not served here"
    assert not hub.asked


def test_what_the_hub_does_not_have_is_asked_for_once_in_a_while(hub: Hub):
    hub.push(OLD, plain())
    catalog = hub_catalog()
    refused(catalog, UnknownAdapterError, "org/none")
    refused(catalog, UnknownAdapterError, f"{REPO}@v9")
    asked = len(hub.asked)
    refused(catalog, UnknownAdapterError, "org/none")
    assert len(hub.asked) == asked
    catalog._hub._failed.clear()  # type: ignore[union-attr]
    hub.branches["v9"] = OLD
    assert OLD in looked_up(catalog, f"{REPO}@v9")[0]


def test_a_hub_that_fails_or_lies(hub: Hub, caplog):
    hub.push(OLD, plain())
    hub.status = 500
    assert "log says why" in refused(hub_catalog(), HubFailedError)
    assert "HTTP 500" in caplog.text
    hub.status, hub.false_digests = 200, True
    refused(hub_catalog(), HubFailedError)
    assert "SHA-256" in caplog.text
    hub.false_digests = False
    refused(hub_catalog(max_bytes=len(plain()[WEIGHTS_FILE]) - 1), UnmergeableError)
    assert looked_up(hub_catalog(), REPO)


def test_without_a_connection_what_is_here_is_served(hub: Hub, monkeypatch):
    hub.push(OLD, plain())
    there = looked_up(hub_catalog(), REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert looked_up(hub_catalog(), REPO) == there
    assert "HF_HUB_OFFLINE" in refused(hub_catalog(), UnknownAdapterError, "org/other")


def test_one_download_for_all_who_ask_and_a_client_that_leaves_stops_nothing(hub: Hub):
    hub.push(OLD, plain())
    hub.gate.clear()
    catalog = hub_catalog()

    async def scenario() -> None:
        asking = [asyncio.create_task(catalog.look_up([REPO], param="adapters")) for _ in range(20)]
        while not hub.asked:
            await asyncio.sleep(0.001)
        asking[0].cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(catalog.look_up([REPO], param="adapters"), 0.05)
        hub.gate.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert all(OLD in entry[0].path for entry in found[1:])

    asyncio.run(scenario())
    asked = [path for path in hub.asked if path.endswith(CONFIG_FILE)]
    assert len(asked) <= 3  # what one download asks: how large, and for it


def test_downloads_are_bounded_in_number(hub: Hub):
    hub.gate.clear()
    catalog = hub_catalog()

    async def scenario() -> None:
        asking = [
            asyncio.create_task(catalog.look_up([f"org/a{i}"], param="adapters")) for i in range(30)
        ]
        refusals = 0
        for done in asyncio.as_completed(asking[16:]):
            with pytest.raises(BusyError):
                await done
            refusals += 1
        assert refusals == 14
        while len(hub.asked) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        assert len(hub.asked) == 2
        hub.gate.set()
        for task in asking[:16]:
            with pytest.raises(UnknownAdapterError):
                await task

    asyncio.run(scenario())


def test_settings_that_make_no_sense(tmp_path):
    for wrong in (Settings(adapter_dir=str(tmp_path / "none")), Settings(hub_allow="org")):
        with pytest.raises(SettingsError):
            Catalog.of(wrong, {}, Access(), lambda _: False)


def test_what_the_policy_hides_is_as_unknown_as_what_is_not_there(tmp_path, hub: Hub):
    hub.push(OLD, plain())
    home = adapter(tmp_path / "home" / "sql").parent
    adapter(home / "other")
    policy = Policy.from_toml(
        '[[allow]]\nadapters = ["sql", "served"]\n[[allow]]\nadapters = ["o*"]'
    )
    access = Access(policy)
    served = {"served": str(adapter(tmp_path / "served")), "hidden": str(tmp_path)}
    hub_adapters = HubAdapters(allow("org/* x/y"), LIMIT)
    catalog = Catalog(served, AdapterFolder(home), hub_adapters, access=access)
    adapter(home / "secret")
    with access.of([]):
        assert looked_up(catalog, "sql", "served")
        assert looked_up(catalog, "other", REPO)
        with pytest.raises(ForbiddenError, match="'other', 'sql'"):
            looked_up(catalog, "sql", "other")
        messages = {
            refused(catalog, UnknownAdapterError, n).replace(n, "?")
            for n in ("secret", "none", "hidden", "x/y")
        }
        assert len(messages) == 1
        assert catalog.names() == ["org/sql", "other", "served", "sql"]
        assert catalog.folder_names() == ["other", "sql"]
        assert catalog.names_to_fetch() == []
    assert catalog.names_to_fetch() == ["x/y"]
    assert "secret" in catalog.names()
