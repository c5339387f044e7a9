"""The tables S1 to S5 and S8, a round at a time, on two servers that are up."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any, Self

import httpx

from benchmarks.serving import traffic
from benchmarks.serving.figures import Figures
from benchmarks.serving.load import Join, Streams, join_after_loading, join_with, measure
from benchmarks.serving.peers import MODEL, Peers, device_bytes, resident_bytes
from benchmarks.serving.traffic import Load
from lego_core.adapter_files import WEIGHTS_FILE
from vllm_lego.demo.server import ServerProcess

# Random weights go round in circles among broken bytes, which vLLM's detokenizer holds back and
# decodes again and again: words and parts of words in ASCII only.
PLAIN = {"allowed_token_ids": list(range(300, 364))}
NATIVES = 4  # adapters that stock vLLM loads at its start
KNOWN = 24  # adapters that sets are made of again and again
ON_DEVICE = 16  # adapters, members or merges, that the device's budget holds
STORED = 3  # joins of S4 for each place
JOINING = 3  # adapters of a set
_SETTLED_S = 0.2  # what was merged before may still be on its way to the store


class Comparison:
    """Rounds of all tables but S6.

    Adapters come in three parts: those that sets are made of again and again, and two that nobody
    has read before S3 and before S4.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        figures: Figures,
        both: Peers,
        adapters: Mapping[str, Path],
        budgets: Mapping[str, int],
    ) -> None:
        self._options = options
        self._figures = figures
        self._both = both
        self._paths = [str(path) for path in adapters.values()]
        names = list(adapters)
        self._known = names[:KNOWN]
        self._unseen = names[KNOWN:]
        self._budgets = budgets
        natives = list(adapters.values())[:NATIVES]
        self._natives_bytes = sum((path / WEIGHTS_FILE).stat().st_size for path in natives)
        self._fresh = count(1)
        self._weights = (1 + n / 1000 for n in count(1))  # each makes a set a new one
        self._clients: tuple[httpx.AsyncClient, httpx.AsyncClient]
        self._stack = AsyncExitStack()
        self._before: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        limits = httpx.Limits(max_connections=None)
        lego, stock = [
            await self._stack.enter_async_context(
                httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits)
            )
            for server in (self._both.lego, self._both.stock)
        ]
        self._clients = lego, stock
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def measure(self, table: str) -> None:
        """Add a round of a table to the figures."""
        await getattr(self, "_" + table.lower())()

    async def warm_up(self) -> None:
        """First use compiles and allocates; what that takes is not the plugin's."""
        for server in (self._both.lego, self._both.stock):
            streams = max(self._options.streams)
            await traffic.serve(server.url, MODEL, self._load([{}], 2 * streams, streams))
        self._before = self._in_use(self._both.stock)
        self._before["host"] -= self._natives_bytes
        for weight in (1.0, 0.5):
            await join_with({"adapters": self._set(0, weight)})(self._clients[0])
        await join_with({"model": "native0"})(self._clients[1])

    async def _s1(self) -> None:
        for streams in self._options.streams:
            requests = max(8, streams, min(4 * streams, 128))
            await self._served(
                "S1",
                f"{streams} streams",
                self._load([{"adapters": self._set(0)}], requests, streams),
                self._load([{"model": "native0"}], requests, streams),
                ">= 0.99",
                "<= 1.02",
            )

    async def _s2(self) -> None:
        streams = min(64, max(self._options.streams))
        sets = [{"adapters": self._set(i)} for i in range(NATIVES)]
        natives = [{"model": f"native{i}"} for i in range(NATIVES)]
        for case, base in (("four", []), ("four, and as many of the base model", [{}] * NATIVES)):
            await self._served(
                "S2",
                case,
                self._load([*sets, *base], 2 * streams, streams),
                self._load([*natives, *base], 2 * streams, streams),
                ">= 0.99",
                "",
            )

    async def _s3(self) -> None:
        lego, stock = self._clients
        joins = self._options.joins
        await self._join([self._set(i, next(self._weights)) for i in range(0, joins + 2, JOINING)])
        peer = await self._stall(
            stock, [join_after_loading(f"fresh{next(self._fresh)}", p) for p in self._paths[:joins]]
        )
        cold = [join_with({"adapters": self._set(i, next(self._weights))}) for i in range(joins)]
        conditions: dict[str, Sequence[Join]] = {
            "nothing arrives": [],
            "cached sets arrive": [join_with({"adapters": self._set(0)})] * joins,
            "cold sets arrive": cold,  # of members that are known, as the sets above have them
        }
        if len(self._unseen) >= JOINING * (joins + STORED):
            conditions["cold sets of new adapters arrive"] = [
                join_with({"adapters": [self._unseen.pop() for _ in range(JOINING)]})
                for _ in range(joins)
            ]
        for case, joining in conditions.items():
            found = await self._stall(lego, joining)
            goal = "<= 0.2" if case == "cold sets arrive" else ""
            measures = {
                "longest gap": ("ms", goal, found["longest_ms"], peer["longest_ms"]),
                "p99 gap": ("ms", goal, found["p99_ms"], peer["p99_ms"]),
                "the client's own delay": ("ms", "", found["client_lag_ms"], peer["client_lag_ms"]),
            }
            if joining:
                waits = [statistics.median(one["ttft_ms"]) for one in (found, peer)]
                measures["first token, median"] = ("ms", "", waits[0], waits[1])
            self._figures.add("S3", case, measures)

    async def _s4(self) -> None:
        lego = self._clients[0]
        for merge in (await lego.get("/v1/adapters/merged")).json()["data"]:
            (await lego.delete(f"/v1/adapters/merged/{merge['id']}")).raise_for_status()
        stored = self._different(STORED)
        await self._join(stored)
        await self._first_token("members on the device", "<= 1.0", self._different(STORED))
        # So many merges that they leave no room to others, neither there nor in host memory.
        await self._join(
            [self._set(-JOINING, next(self._weights)) for _ in range(self._options.in_host)]
        )
        await self._join(self._different(STORED))
        await self._first_token("members in host memory", "<= 1.0", self._different(STORED))
        await self._first_token("in the store", "<= 1.0", stored)
        if len(self._unseen) >= JOINING * STORED:
            new = [[self._unseen.pop() for _ in range(JOINING)] for _ in range(STORED)]
            await self._first_token("members on disk", "<= 1.5", new)

    async def _s5(self) -> None:
        many = min(64, max(self._options.streams))
        for streams, throughput, ttft in ((1, "", "<= 1.01"), (many, ">= 0.995", "")):
            load = self._load([{}], max(8, 2 * streams), streams)
            await self._served("S5", f"{streams} streams", load, load, throughput, ttft)

    async def _s8(self) -> None:
        for what, in_use in self._in_use(self._both.lego).items():
            taken = in_use - self._before[what]
            measure = {"taken; peer: the budget": ("bytes", "<= 1.0", taken, self._budgets[what])}
            self._figures.add("S8", what, measure)

    def _set(self, first: int, weight: float = 1.0) -> list[Any]:
        """Three known adapters that follow each other; weights make sets new."""
        names = [self._known[(first + i) % KNOWN] for i in range(JOINING)]
        return [{"name": names[0], "weight": weight}, *names[1:]]

    def _different(self, count: int) -> list[list[Any]]:
        """Sets that have no member in common, never asked for before."""
        return [self._set(JOINING * i, next(self._weights)) for i in range(count)]

    async def _join(self, sets: Sequence[Sequence[Any]]) -> None:
        for one in sets:
            await join_with({"adapters": one})(self._clients[0])

    async def _first_token(self, case: str, goal: str, sets: Sequence[Sequence[Any]]) -> None:
        """Time cold sets, one after the other, beside stock vLLM loading adapters."""
        lego, stock = self._clients
        waits, peer = [], []
        before = await self._hits("disk")
        for path, one in zip(self._paths, sets, strict=False):
            waits.append(await _timed(lego, join_with({"adapters": one})))
            fresh = join_after_loading(f"fresh{next(self._fresh)}", path)
            peer.append(await _timed(stock, fresh))
        if await self._hits("disk") - before != (len(sets) if case == "in the store" else 0):
            raise RuntimeError(f"{case}: they were not where they were meant to be")
        wait, peers = statistics.median(waits), statistics.median(peer)
        self._figures.add("S4", case, {"first token": ("ms", goal, wait, peers)})

    def _load(self, targets: Sequence[Mapping[str, Any]], requests: int, streams: int) -> Load:
        tokens = self._options.tokens
        return Load(targets, requests, streams, tokens, tokens, PLAIN)

    async def _served(
        self, table: str, case: str, lego: Load, stock: Load, throughput: str, ttft: str
    ) -> None:
        """Serve a load of what is warm on each twice, in the order ABBA: what drifts meets both."""
        for client, load in zip(self._clients, (lego, stock), strict=True):
            for target in load.targets:  # other tables have dropped it, or pushed it out
                await join_with(target)(client)
        await asyncio.sleep(_SETTLED_S)
        ours, theirs = (self._both.lego.url, lego), (self._both.stock.url, stock)
        found = [
            await traffic.serve(url, MODEL, load) for url, load in (ours, theirs, theirs, ours)
        ]
        first, second = found[0] + found[3], found[1] + found[2]
        self._figures.add(
            table,
            case,
            {
                "throughput": ("tokens/s", throughput, first.throughput, second.throughput),
                "first token, median": ("ms", ttft, first.ttft_ms(0.5), second.ttft_ms(0.5)),
            },
        )

    async def _stall(self, client: httpx.AsyncClient, joins: Sequence[Join]) -> dict[str, Any]:
        fields = {"model": MODEL, "max_tokens": 4000, **PLAIN}
        streams = Streams(
            str(client.base_url).rstrip("/"), fields, min(32, max(self._options.streams))
        )
        return await measure(client, streams, joins, idle_s=2)

    async def _hits(self, tier: str) -> float:
        text = (await self._clients[0].get("/metrics")).text
        [value] = [
            line.split()[-1]
            for line in text.splitlines()
            if line.startswith(f'vllm_lego_cache_hits_total{{tier="{tier}"}}')
        ]
        return float(value)

    def _in_use(self, server: ServerProcess) -> dict[str, int]:
        """Return the host memory of a server, and that of the device that the plugin's runs on."""
        device = device_bytes((self._options.gpus or ["0"])[0])
        host = {"host": resident_bytes(server)}
        return host if device is None else {**host, "device": device}


async def _timed(client: httpx.AsyncClient, join: Join) -> float:
    """Return how long a join takes, in ms, on a server that does nothing else."""
    await asyncio.sleep(_SETTLED_S)
    started = time.perf_counter()
    await join(client)
    return (time.perf_counter() - started) * 1e3
