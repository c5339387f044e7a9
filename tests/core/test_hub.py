"""Adapters from the hub, against a local server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from lego_core import (
    AdapterFormatError,
    AdapterNotFoundError,
    HubError,
    LegoError,
    describe_adapter,
    load_adapter,
    resolve_source,
)
from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import INDEX_FILE, PICKLE_FILE, WEIGHTS_FILE
from tests import strategies

REPO = "org/sql"
OLD, NEW = "a" * 40, "b" * 40
CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})


def weights(seed: int = 0, layer: int = 0) -> dict[str, torch.Tensor]:
    module = strategies.module(seed, 2, dtype=torch.float32)
    prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    return {f"{prefix}.lora_A.weight": module.lora_a, f"{prefix}.lora_B.weight": module.lora_b}


def plain(seed: int = 0) -> dict[str, bytes]:
    return {CONFIG_FILE: CONFIG.encode(), WEIGHTS_FILE: save(weights(seed))}


def sharded(**changes: Any) -> dict[str, bytes]:
    """An adapter of two shards; `changes` go into the index."""
    shards = {f"adapter_model-0000{i}-of-00002.safetensors": weights(i, i) for i in (1, 2)}
    index = {key: shard for shard, tensors in shards.items() for key in tensors}
    content = {"weight_map": {k: v for k, v in (index | changes).items() if v}}
    return {
        CONFIG_FILE: CONFIG.encode(),
        INDEX_FILE: json.dumps(content).encode(),
        **{shard: save(tensors) for shard, tensors in shards.items()},
    }


@dataclass
class Hub:
    """What the server has, and how it misbehaves."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    status: int = 200
    error_code: str = ""
    lie: int = 0
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def push(self, commit: str, files: dict[str, bytes], branch: str = "main") -> None:
        self.commits[commit] = files
        self.branches[branch] = commit


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", lie: int = 0) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + lie))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self) -> None:
        hub, path = self.hub, unquote(self.path)
        if path.startswith("/cdn/"):  # where large files are redirected to
            _, _, commit, file = path.split("/", 3)
            self._send(200, {}, hub.commits[commit][file])
            return
        hub.asked.append(path)
        if hub.status != 200:
            self._send(hub.status, {"X-Error-Code": hub.error_code} if hub.error_code else {})
            return
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = hub.branches.get(revision, revision)
        if repo == "org/moved":  # a renamed repository: a relative redirect, followed by hand
            self._send(307, {"Location": f"/{REPO}/resolve/{rest}"})
        elif repo != REPO:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif commit not in hub.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif file not in hub.commits[commit]:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            content = hub.commits[commit][file]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"X-Repo-Commit": commit, "ETag": etag}
            if file.endswith(".safetensors"):
                size = str(len(content) + hub.lie)
                headers |= {"X-Linked-Size": size, "X-Linked-ETag": etag}
                cdn = hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's is
                headers |= {"Location": f"{cdn}/cdn/{commit}/{file}"}
                self._send(302, headers)
            else:
                self._send(200, headers, content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    handler = type("Handler", (_Handler,), {"hub": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    # What HF_ENDPOINT and HF_HUB_CACHE become when huggingface_hub is imported.
    for name, value in {
        "ENDPOINT": found.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


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
    assert {path.rpartition("/")[2] for path in hub.asked} == {CONFIG_FILE, WEIGHTS_FILE}


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
