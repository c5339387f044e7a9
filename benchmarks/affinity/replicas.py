"""Replicas of one small server, and vLLM's own router in front of them."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from vllm_lego.demo.server import LEGO_SERVE, ServerProcess, free_port, server_environment

MODEL = "tiny"
KEY = "the-right-key"
HEADERS = {"authorization": f"Bearer {KEY}"}
ADAPTERS = 10
MERGE_BYTES = 262_144  # a merge of rank 8 in the served model's float32
DEVICE_MERGES, HOST_MERGES = 8, 30  # a replica's memory, in merges; members take of the host's
SETS: list[tuple[str, ...]] = list(combinations([f"adapter{i}" for i in range(ADAPTERS)], 2))[:40]
TIERS = ("device", "host", "disk")


def affinity_key(names: Sequence[str]) -> str:
    """Return what a client sends as `x-session-id`: the same whatever the set's order."""
    return "+".join(sorted(names))


@contextmanager
def replicas(
    folder: Path,
    tokenizer: Path,
    *,
    store: Path | None,
    ports: Sequence[int | None] = (None, None),
) -> Iterator[list[ServerProcess]]:
    """Run two servers of one model and ten adapters, alike but for their ports.

    Args:
        folder: for the model's files and the adapters'.
        tokenizer: the folder of the embedded model.
        store: the folder of merges that they share, if they do.
        ports: to listen on; free ones by default. Routers hash them.
    """
    adapters = write_adapters(SHAPES["tiny"], folder, ADAPTERS, rank=8)
    arguments = [
        str(write_model(SHAPES["tiny"], folder / "model", tokenizer, weights=True)),
        f"--served-model-name={MODEL}",
        f"--chat-template={tokenizer / 'chat_template.jinja'}",
        "--dtype=float32",  # bfloat16 would turn near-ties when a batch is another
        "--enforce-eager",
        "--max-model-len=256",
        "--max-num-seqs=16",
        "--gpu-memory-utilization=0.2",
        "--max-loras=4",
        "--max-lora-rank=8",
        f"--device-cache-bytes={DEVICE_MERGES * MERGE_BYTES}",
        f"--host-cache-bytes={HOST_MERGES * MERGE_BYTES}",
        *([f"--store-dir={store}"] if store else []),
        "--max-restarts=64",  # slow merges, for merges of both at the same time
        "--lora-modules",
        *(f"{name}={path}" for name, path in adapters.items()),
    ]
    environment = server_environment() | {"VLLM_API_KEY": KEY}
    servers = [
        ServerProcess(arguments, environment, port=port, command=LEGO_SERVE) for port in ports
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for server in servers:
            stack.push(server)  # stopped even if another does not start
        list(pool.map(ServerProcess.__enter__, servers))
        yield servers


def router(policy: str, urls: Sequence[str], *flags: str) -> ServerProcess:
    """Return `vllm-router` in front of the servers at these URLs; enter it to start it."""
    arguments = [
        f"--policy={policy}",
        "--worker-startup-check-interval=1",
        "--log-level=warning",
        f"--prometheus-port={free_port()}",  # fixed unless given
        *flags,
        "--worker-urls",
        *urls,
    ]
    return ServerProcess(arguments, os.environ, command=("-m", "vllm_router.launch_router"))


def metrics(server: ServerProcess) -> dict[str, float]:
    """Return the plugin's series of one replica, by name and labels."""
    text = httpx.get(server.url + "/metrics", timeout=60).text
    return {
        name: float(value)
        for name, value in re.findall(r"^(vllm_lego_\S+) (\S+)$", text, re.MULTILINE)
    }


def merged(server: ServerProcess) -> dict[str, str]:
    """Return the tier of every merge that one replica need not make, by its id."""
    answer = httpx.get(server.url + "/v1/adapters/merged", headers=HEADERS, timeout=60)
    return {merge["id"]: merge["tier"] for merge in answer.json()["data"]}


def forget(servers: Sequence[ServerProcess]) -> None:
    """Drop every merge from every replica and its store."""
    for server in servers:
        for identity in merged(server):
            url = f"{server.url}/v1/adapters/merged/{identity}"
            httpx.delete(url, headers=HEADERS, timeout=60).raise_for_status()


@dataclass(frozen=True, slots=True)
class Measured:
    """What requests through a router met.

    Attributes:
        answers: id of the merge and tokens, by request.
        results: how often a set was a hit, a miss (it was merged) or coalesced, over all replicas.
        hits: where hits were found, by tier.
        evictions: of merges from host memory.
        shares: how many of the requests each replica served.
        kept: the ids of the merges that each replica has in the end.
    """

    answers: list[tuple[str, tuple[str, ...]]]
    results: dict[str, int]
    hits: dict[str, int]
    evictions: int
    shares: list[int]
    kept: list[set[str]]


def measure(
    url: str, servers: Sequence[ServerProcess], *, repeats: int, clients: int, draw: int = 0
) -> Measured:
    """Ask for each of `SETS` `repeats` times, in random order, all caches empty at first.

    Args:
        url: of the router.
        servers: the replicas behind it.
        repeats: requests for each set.
        clients: requests at a time.
        draw: of the order, and of the keys: which replica a key's hash falls to.

    Raises:
        httpx.HTTPStatusError: a request was not answered with 200.
    """
    forget(servers)
    before = [metrics(server) for server in servers]
    order = SETS * repeats
    random.Random(draw).shuffle(order)  # noqa: S311
    with (
        httpx.Client(base_url=url, headers=HEADERS, timeout=120) as http,
        ThreadPoolExecutor(clients) as pool,
    ):
        answers = list(pool.map(lambda asked: ask(http, draw, *asked), enumerate(order)))
    after = [metrics(server) for server in servers]

    def counted(series: str) -> list[int]:
        return [
            int(b.get(series, 0) - a.get(series, 0)) for a, b in zip(before, after, strict=True)
        ]

    by_result = {
        result: counted(f'vllm_lego_requests_total{{result="{result}"}}')
        for result in ("hit", "miss", "coalesced")
    }
    return Measured(
        answers,
        {result: sum(counts) for result, counts in by_result.items()},
        {tier: sum(counted(f'vllm_lego_cache_hits_total{{tier="{tier}"}}')) for tier in TIERS},
        sum(counted('vllm_lego_cache_evictions_total{tier="host"}')),
        [sum(counts) for counts in zip(*by_result.values(), strict=True)],
        [set(merged(server)) for server in servers],
    )


def ask(
    http: httpx.Client, draw: int, number: int, names: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Ask for a set as a client behind a router does. Returns the merge's id and the tokens."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": f"{number} times upon a time",
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "adapters": list(names),
    }
    key = {"x-session-id": f"{draw}/{affinity_key(names)}"}
    answer = http.post("/v1/completions", json=body, headers=key).raise_for_status()
    tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    return answer.headers["x-lego-model"], tuple(tokens)
