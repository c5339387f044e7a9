"""Adapters from the hub, against a local server that speaks its protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lego_core import (
    AdapterFormatError,
    AdapterNotFoundError,
    HubError,
    LegoError,
    describe_adapter,
    fetch_adapter,
    load_adapter,
    resolve_source,
)
from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import INDEX_FILE, PICKLE_FILE, WEIGHTS_FILE
from tests.hub_server import CONFIG, NEW, OLD, REPO, Hub, plain, sharded, weights


def refusal(error: type[LegoError], source: str = REPO, revision: str | None = None) -> str:
    with pytest.raises(error) as caught:
        load_adapter(source, revision)
    assert type(caught.value) is error
    assert source in str(caught.value)
    return str(caught.value)


def test_a_repository_is_as_its_folder(hub: Hub, tmp_path: Path) -> None:
    hub.push(OLD, plain())
    (tmp_path / "copy").mkdir()
    for file, content in plain().items():
        (tmp_path / "copy" / file).write_bytes(content)
    adapter = load_adapter(REPO)
    assert (adapter.name, adapter.source, adapter.revision) == (REPO, REPO, OLD)
    assert adapter.digest == load_adapter(tmp_path / "copy").digest == describe_adapter(REPO)[1]
    assert load_adapter(tmp_path / "copy").revision is None


def test_only_configuration_and_safetensors_are_downloaded(hub: Hub) -> None:
    extra = {"README.md": b"", PICKLE_FILE: b"", "optimizer.pt": b"", "x.safetensors": b""}
    hub.push(OLD, plain() | extra)
    load_adapter(REPO)
    files = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert files == {CONFIG_FILE, WEIGHTS_FILE}


def test_a_moved_branch_is_followed_and_a_commit_stays(hub: Hub) -> None:
    hub.push(OLD, plain(0))
    first = load_adapter(REPO, "main")
    hub.push(NEW, plain(1))
    second = load_adapter(REPO, "main")
    assert (first.revision, second.revision) == (OLD, NEW)
    assert first.digest != second.digest
    assert load_adapter(REPO, OLD).digest == first.digest


def test_a_branch_that_moves_meanwhile_is_not_mixed(hub: Hub) -> None:
    """The configuration's commit is everyone's, so weights never come from another."""
    hub.push(OLD, plain(0))
    hub.push(NEW, plain(1))
    hub.branches["main"] = OLD
    found = resolve_source(REPO)
    assert found.revision == OLD
    assert any(path.endswith(WEIGHTS_FILE) for path in hub.asked)
    assert all(f"/{OLD}/" in path for path in hub.asked if CONFIG_FILE not in path)


def test_a_renamed_repository_is_followed(hub: Hub) -> None:
    hub.push(OLD, plain())
    assert load_adapter("org/moved").revision == OLD


def test_shards_are_one_adapter(hub: Hub) -> None:
    hub.push(OLD, sharded())
    adapter = load_adapter(REPO)
    assert len(adapter.modules) == 2
    for layer in (1, 2):
        module = adapter.modules[f"model.layers.{layer}.self_attn.q_proj"]
        assert torch.equal(module.lora_a, next(iter(weights(layer, layer).values())))
    _, digest, nbytes = describe_adapter(REPO)
    assert digest == adapter.digest
    shards = [content for file, content in sharded().items() if file.endswith(".safetensors")]
    assert nbytes == sum(map(len, shards))


@pytest.mark.parametrize("shard", ["../x.safetensors", "a/b.safetensors", "x.bin", "..", 5, None])
def test_index_that_leads_elsewhere(hub: Hub, shard: Any) -> None:
    files = sharded()
    files[INDEX_FILE] = json.dumps({"weight_map": {"x": shard}}).encode()
    hub.push(OLD, files)
    assert "shard" in refusal(AdapterFormatError)
    assert not any("x.safetensors" in path for path in hub.asked)


def test_hub_without_connection_serves_what_is_in_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(OLD, sharded())
    digest = load_adapter(REPO).digest
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_adapter(REPO).digest == digest
    assert load_adapter(REPO, "main").revision == OLD
    assert not hub.asked
    assert "HF_HUB_OFFLINE" in refusal(AdapterNotFoundError, "org/other")


def test_local_folder_wins(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / REPO
    folder.mkdir(parents=True)
    for file, content in plain().items():
        (folder / file).write_bytes(content)
    adapter = load_adapter(REPO)
    assert (adapter.name, adapter.source, adapter.revision) == ("sql", REPO, None)
    assert "revision 'main'" in refusal(AdapterNotFoundError, revision="main")
    assert not hub.asked


@pytest.mark.parametrize("source", [Path("org/none"), "./org/none", "a/b/c", "none", "org/..", ""])
def test_what_is_no_name_is_a_folder(hub: Hub, source: Any) -> None:
    with pytest.raises(AdapterNotFoundError):
        load_adapter(source)
    assert not hub.asked


def test_not_found(hub: Hub) -> None:
    assert "HF_TOKEN" in refusal(AdapterNotFoundError, "org/none")
    hub.push(OLD, {WEIGHTS_FILE: b""})
    assert CONFIG_FILE in refusal(AdapterNotFoundError)
    assert "no revision 'v9'" in refusal(AdapterNotFoundError, revision="v9")
    hub.push(NEW, {CONFIG_FILE: CONFIG.encode()})
    assert WEIGHTS_FILE in refusal(AdapterNotFoundError)


def test_only_a_pickle(hub: Hub) -> None:
    hub.push(OLD, {CONFIG_FILE: CONFIG.encode(), PICKLE_FILE: b"\x80\x04."})
    message = refusal(AdapterNotFoundError)
    assert "executes code" in message
    assert "save_file" in message


@pytest.mark.parametrize(
    ("status", "code", "error", "named"),
    [
        (401, "", AdapterNotFoundError, "HF_TOKEN"),
        (403, "", AdapterNotFoundError, "HF_TOKEN"),
        (403, "GatedRepo", AdapterNotFoundError, "gated"),
        (404, "", HubError, "404"),
        (500, "", HubError, "500"),
        (503, "", HubError, "503"),
    ],
)
def test_what_the_hub_answers_is_said(
    hub: Hub, status: int, code: str, error: type[LegoError], named: str
) -> None:
    hub.status, hub.error_code = status, code
    assert named in refusal(error)


@pytest.mark.parametrize("lie", [-1, 1])
def test_sizes_that_are_lies(hub: Hub, lie: int) -> None:
    hub.push(OLD, plain())
    hub.lie = lie
    assert WEIGHTS_FILE in refusal(HubError)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert "HF_ENDPOINT" in refusal(HubError)


def test_a_commit_that_is_none(hub: Hub) -> None:
    hub.push("main-as-ever", plain())
    assert "main-as-ever" in refusal(HubError)


LIMIT = sum(map(len, plain().values()))


def cached_bytes(tmp_path: Path) -> int:
    """Bytes of all blobs, whole or not, in the cache."""
    return sum(blob.stat().st_size for blob in (tmp_path / "cache").glob("*/blobs/*"))


def too_large(max_bytes: int) -> str:
    with pytest.raises(AdapterFormatError) as caught:
        fetch_adapter(REPO, max_bytes=max_bytes)
    return str(caught.value)


@pytest.mark.parametrize("files", [plain, sharded])
def test_an_adapter_within_the_limit_comes_whole(hub: Hub, files: Any) -> None:
    hub.push(OLD, files())
    limit = sum(map(len, files().values()))
    found = fetch_adapter(REPO, max_bytes=limit)
    assert (found.source, found.revision) == (REPO, OLD)
    assert load_adapter(found.folder).digest == load_adapter(REPO).digest
    assert fetch_adapter(REPO, max_bytes=1) == found  # it is here: nothing is downloaded


@pytest.mark.parametrize("files", [plain, sharded])
def test_an_adapter_over_the_limit_is_refused_before_it_comes(hub: Hub, files: Any) -> None:
    hub.push(OLD, files())
    message = too_large(sum(map(len, files().values())) - 1)
    assert ".safetensors" in message
    assert hub.sent == 0


def test_a_configuration_over_its_limit_is_refused(hub: Hub) -> None:
    hub.push(OLD, plain() | {CONFIG_FILE: b" " * ((1 << 20) + 1)})
    assert CONFIG_FILE in too_large(1 << 30)


def test_a_hub_that_sends_more_than_it_said_is_cut_off(hub: Hub, tmp_path: Path) -> None:
    hub.push(OLD, plain())
    hub.surplus = 256 << 20
    assert WEIGHTS_FILE in too_large(LIMIT)
    assert hub.sent < 64 << 20  # blocks of 10 MiB, and what buffers hold
    assert cached_bytes(tmp_path) < LIMIT


def test_a_hub_that_says_less_than_it_sends_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.push(OLD, plain())
    hub.lie = -len(plain()[WEIGHTS_FILE]) + 1
    with pytest.raises(HubError, match=WEIGHTS_FILE):
        fetch_adapter(REPO, max_bytes=LIMIT)
    assert cached_bytes(tmp_path) < LIMIT


def test_a_hub_that_lies_about_digests_is_refused_again_and_again(hub: Hub) -> None:
    hub.push(OLD, plain())
    hub.false_digests = True
    for _ in range(2):
        assert "SHA-256" in refusal(HubError)
    hub.false_digests = False
    assert load_adapter(REPO).revision == OLD


def test_a_damaged_file_of_the_cache_is_noticed_and_fetched_again(hub: Hub) -> None:
    """The process may have died between a download and the look at its digest."""
    hub.push(OLD, plain())
    found = fetch_adapter(REPO)
    (found.folder / WEIGHTS_FILE).write_bytes(b"other")
    assert "removed" in refusal(HubError)
    assert load_adapter(REPO).revision == OLD


def test_a_repository_is_never_a_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / REPO).mkdir(parents=True)
    hub.push(OLD, plain())
    assert fetch_adapter(REPO).revision == OLD


def test_too_many_shards(hub: Hub) -> None:
    names = {f"x{i}": f"{i}.safetensors" for i in range(300)}
    hub.push(
        OLD, {CONFIG_FILE: CONFIG.encode(), INDEX_FILE: json.dumps({"weight_map": names}).encode()}
    )
    assert "300 shards" in too_large(1 << 30)
    assert not any(path.endswith("/0.safetensors") for path in hub.asked)


def test_blobs_that_repositories_share_are_read(hub: Hub, tmp_path: Path) -> None:
    """As huggingface_hub lays out what comes by Xet: a blob is a link into the cache's own."""
    hub.push(OLD, plain())
    folder = fetch_adapter(REPO).folder
    blob = folder / (folder / WEIGHTS_FILE).readlink()
    shared = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    assert load_adapter(REPO).revision == OLD
    outside = tmp_path / "outside"
    shared.rename(outside)
    shared.symlink_to(outside)
    assert "leads out" in refusal(AdapterFormatError)
