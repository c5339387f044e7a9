"""Clients of the stall table: streams that run, and requests that join them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import aiohttp
import httpx

_WARM_TOKENS = 8
_SETTLE_S = 0.3
_BEAT_S = 0.005

Join = Callable[[httpx.AsyncClient], Awaitable[None]]


class Streams:
    """Completions that run until they are stopped, one after the other; when each token arrived.

    One that reaches `max_tokens` is followed by another, which is nobody's gap: it joins the others
    as a cached set does, so let `max_tokens` be large.

    Read with aiohttp, counting and not parsing: 32 streams of a fast model are thousands of tokens a
    second, and a client that cannot follow times its own backlog.

    Args:
        url: of the server.
        fields: of the requests: the model, `max_tokens`.
        count: of streams.
    """

    def __init__(self, url: str, fields: Mapping[str, Any], count: int) -> None:
        self._url = f"{url}/v1/completions"
        self._body = {"temperature": 0, "ignore_eos": True, "stream": True, **fields}
        self._count = count
        self._arrivals: list[list[float]] = []
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep them running while the context is open.

        Raises:
            RuntimeError: the server refused one; it holds the answer.
        """
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        self._tasks = [asyncio.create_task(self._run(session, i)) for i in range(self._count)]
        try:
            while sum(len(times) >= _WARM_TOKENS for times in self._arrivals) < self._count:
                self._check()
                await asyncio.sleep(0.01)
            yield
            self._check()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await session.close()

    def gaps_ms(self, start: float, end: float) -> list[float]:
        """Return the gaps between tokens that overlap a span of `time.perf_counter()`, in ms."""
        return [
            (b - a) * 1e3
            for times in self._arrivals
            for a, b in pairwise(times)
            if b >= start and a <= end
        ]

    def _check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def _run(self, session: aiohttp.ClientSession, number: int) -> None:
        body = self._body | {"prompt": f"Once upon a time, {number} of us"}
        while True:
            times: list[float] = []
            self._arrivals.append(times)
            async with session.post(self._url, json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(await answer.text())
                async for chunk in answer.content.iter_any():
                    times += [time.perf_counter()] * chunk.count(b"data: {")


async def measure(
    client: httpx.AsyncClient, streams: Streams, joins: Sequence[Join], idle_s: float
) -> dict[str, Any]:
    """Let requests join running streams one after the other, or watch them alone for `idle_s`.

    Returns:
        Longest, p99 and median gap of the streams in ms, over the time of the joins; the time to
        the first token of each join in ms; and how late the client itself was at worst, in ms.
    """
    waits: list[float] = []
    async with streams.running(), _own_lag() as lag:
        await asyncio.sleep(_SETTLE_S)
        start = time.perf_counter()
        for join in joins:
            asked = time.perf_counter()
            await join(client)
            waits.append((time.perf_counter() - asked) * 1e3)
            await asyncio.sleep(_SETTLE_S)
        if not joins:
            await asyncio.sleep(idle_s)
        end = time.perf_counter()
    gaps = sorted(streams.gaps_ms(start, end))
    return {
        "longest_ms": round(gaps[-1], 2),
        "p99_ms": round(gaps[int(0.99 * (len(gaps) - 1))], 2),
        "median_ms": round(gaps[len(gaps) // 2], 2),
        "tokens": len(gaps),
        "ttft_ms": [round(wait, 1) for wait in waits],
        "client_lag_ms": round(max(lag) * 1e3, 1),
    }


@asynccontextmanager
async def _own_lag() -> AsyncIterator[list[float]]:
    """Collect how late the client's own loop is, in seconds: gaps of that size may be its own."""
    late = [0.0]

    async def beat() -> None:
        while True:
            due = time.perf_counter() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            late.append(time.perf_counter() - due)

    task = asyncio.create_task(beat())
    try:
        yield late
    finally:
        task.cancel()


def join_with(fields: Mapping[str, Any]) -> Join:
    """A request for one token."""

    async def join(client: httpx.AsyncClient) -> None:
        await post(
            client,
            "/v1/completions",
            {"prompt": "Hello", "max_tokens": 1, "temperature": 0, **fields},
        )

    return join


def join_after_loading(name: str, path: str) -> Join:
    """Stock vLLM's way to a new adapter: load it, then ask for one token."""

    async def join(client: httpx.AsyncClient) -> None:
        await post(client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        await join_with({"model": name})(client)

    return join


async def post(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> httpx.Response:
    """POST and return an answer of 200.

    Raises:
        RuntimeError: it was another.
    """
    answer = await client.post(path, json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:500]}")
    return answer
