"""One real server on the real model for all end-to-end tests."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import (
    LEGO_SERVE,
    MODEL_NAME,
    ServerProcess,
    server_arguments,
    server_environment,
    shipped_adapters,
)

KEY = "the-right-key"
CACHE_BYTES = 24_000_000
BODY_BYTES = 1 << 20
QUEUED_MERGES = 4
TINY_SERVER = [  # for `SHAPES["tiny"]` and adapters of rank 8
    "--served-model-name=tiny",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=1024",
    "--max-num-seqs=16",
    "--gpu-memory-utilization=0.2",
    "--max-lora-rank=8",
    "--max-loras=2",
]


@pytest.fixture(scope="session")
def model() -> Path:
    return embedded_model()


@pytest.fixture(scope="session")
def replaceable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a served adapter that a test may change."""
    folder = tmp_path_factory.mktemp("adapters") / "replaceable"
    shutil.copytree(shipped_adapters()["shout"], folder)
    return folder


@pytest.fixture(scope="session")
def server(model: Path, replaceable: Path) -> Iterator[ServerProcess]:
    given = server_arguments(model, shipped_adapters() | {"replaceable": replaceable})
    arguments = [
        # These two are for `vllm-lego serve` to choose.
        *(a for a in given if not a.startswith(("--enable-lora", "--max-lora-rank"))),
        f"--device-cache-bytes={CACHE_BYTES}",
        f"--max-body-bytes={BODY_BYTES >> 20}MiB",
        f"--max-queued-merges={QUEUED_MERGES}",
        "--max-restarts=64",  # slow merges, for tests of waiting
        *("--enable-auto-tool-choice", "--tool-call-parser=hermes"),
    ]
    environment = server_environment() | {
        "VLLM_API_KEY": KEY,
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    }
    with ServerProcess(arguments, environment, progress=print, command=LEGO_SERVE) as process:
        yield process
        assert process.is_alive(), process.log_tail()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as session:
        yield session


@pytest.fixture
def metric(http: httpx.Client) -> Callable[..., float]:
    """Read one series of the server's metrics."""
    return partial(read_metric, http)


def read_metric(http: httpx.Client, name: str, **labels: str) -> float:
    """Return the value of the first series with this name and these labels."""
    for line in http.get("/metrics").text.splitlines():
        match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        found = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")) if match else {}
        if match and labels.items() <= found.items():
            return float(match[2])
    raise AssertionError(f"no series {name}{labels}")


def chat(question: str, **fields: Any) -> dict[str, Any]:
    """Arguments of a greedy chat completion; what OpenAI's API lacks goes into the extra body."""
    extra = {name: fields.pop(name) for name in ("adapters", "merge") if name in fields}
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 32,
        "extra_body": extra,
        **fields,
    }


def ask(client: OpenAI, question: str, **fields: Any) -> tuple[str, Mapping[str, str]]:
    """Return a greedy answer and the headers it came with."""
    raw = client.chat.completions.with_raw_response.create(**chat(question, **fields))
    return raw.parse().choices[0].message.content or "", raw.headers
