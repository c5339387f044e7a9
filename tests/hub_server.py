"""A local server that speaks the hub's protocol, and lies if it is told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import torch
from safetensors.torch import save

from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import INDEX_FILE, WEIGHTS_FILE
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
    """What the server has, and how it misbehaves.

    Attributes:
        lie: added to the sizes of weights that it tells.
        surplus: zeros that follow the weights it sends.
        false_digests: whether the digests of weights that it tells are others'.
        gate: while it is clear, nothing is answered.
        asked: the paths of files that it was asked for.
        sent: bytes of weights that went out.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    status: int = 200
    error_code: str = ""
    lie: int = 0
    surplus: int = 0
    false_digests: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    sent: int = 0
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

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

    def _send_weights(self, content: bytes) -> None:
        self._send(200, {}, content, lie=self.hub.surplus)
        self.hub.sent += len(content)
        left = self.hub.surplus
        with suppress(OSError):  # the client has had enough
            while left:
                self.hub.sent += self.wfile.write(bytes(min(left, 1 << 16)))
                left -= min(left, 1 << 16)
        self.close_connection = bool(self.hub.surplus)

    def _answer(self) -> None:
        hub, path = self.hub, unquote(self.path)
        if path.startswith("/cdn/"):  # where large files are redirected to
            _, _, commit, file = path.split("/", 3)
            self._send_weights(hub.commits[commit][file])
            return
        hub.asked.append(path)
        hub.gate.wait()
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
                if hub.false_digests:
                    etag = f'"{hashlib.sha256(content + b"!").hexdigest()}"'
                headers |= {"X-Linked-Size": size, "X-Linked-ETag": etag}
                cdn = hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's is
                headers |= {"Location": f"{cdn}/cdn/{commit}/{file}"}
                self._send(302, headers)
            else:
                self._send(200, headers, content)


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Serve a hub on a loopback port, which its `url` names."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
