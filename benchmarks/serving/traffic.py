"""Load of many requests at once, sent and timed by vLLM's own benchmark client.

Throughput, time to first token and inter-token latency are those of `vllm bench serve`: output
tokens over the time from the first request to the last answer; the first chunk with a choice; the
time between such chunks.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_completions,
)

_draws = random.Random(0)  # noqa: S311
_TIMEOUT = aiohttp.ClientTimeout(total=300)


@dataclass(frozen=True, slots=True)
class Load:
    """Completions of random tokens.

    Attributes:
        targets: what they ask for, in turn: `{"model": …}` or `{"adapters": […]}`.
        count: of requests.
        streams: that run at the same time.
        prompt_tokens, output_tokens: of each.
        fields: more fields of each body.
    """

    targets: Sequence[Mapping[str, Any]]
    count: int
    streams: int
    prompt_tokens: int = 128
    output_tokens: int = 128
    fields: Mapping[str, Any] = ()  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Served:
    """How loads were served: output tokens, seconds of all, and until each request's first token."""

    tokens: int
    seconds: float
    ttft_s: list[float]

    def __add__(self, other: Served) -> Served:
        """Return how both were served, one after the other."""
        seconds = self.seconds + other.seconds
        return Served(self.tokens + other.tokens, seconds, [*self.ttft_s, *other.ttft_s])

    @property
    def throughput(self) -> float:
        """Output tokens/s."""
        return self.tokens / self.seconds

    def ttft_ms(self, quantile: float) -> float:
        """Return a quantile of the times to the first token, in ms."""
        if len(self.ttft_s) == 1:
            return self.ttft_s[0] * 1e3
        cuts = statistics.quantiles(self.ttft_s, n=100, method="inclusive")
        return cuts[round(quantile * 100) - 1] * 1e3


async def serve(url: str, model: str, load: Load) -> Served:
    """Send a load and wait for all of it.

    Raises:
        RuntimeError: a request failed, or was answered with fewer tokens.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
        waiting = iter(list(itertools.islice(itertools.cycle(load.targets), load.count)))

        async def stream() -> list[RequestFuncOutput]:
            return [await _ask(session, url, model, target, load) for target in waiting]

        started = time.perf_counter()
        streams = await asyncio.gather(*(stream() for _ in range(load.streams)))
        seconds = time.perf_counter() - started
    outputs = list(itertools.chain.from_iterable(streams))
    return Served(load.count * load.output_tokens, seconds, [one.ttft for one in outputs])


async def _ask(
    session: aiohttp.ClientSession, url: str, model: str, target: Mapping[str, Any], load: Load
) -> RequestFuncOutput:
    output = await async_request_openai_completions(
        RequestFuncInput(
            prompt=[_draws.randrange(300, 40_000) for _ in range(load.prompt_tokens)],
            api_url=f"{url}/v1/completions",
            prompt_len=load.prompt_tokens,
            output_len=load.output_tokens,
            model=str(target.get("model", model)),
            ignore_eos=True,
            extra_body={"temperature": 0, **dict(load.fields), **target},
        ),
        session,
    )
    if not output.success or output.output_tokens != load.output_tokens:
        raise RuntimeError(f"{target}: {output.output_tokens} tokens; {output.error}")
    return output
