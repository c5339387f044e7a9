"""What does the plugin cost requests that name no set of adapters?

    .venv/bin/python -m benchmarks.overhead            # both parts, two servers
    .venv/bin/python -m benchmarks.overhead --no-server  # the first part alone

1. The interception alone, as an ASGI application around one that reads the body as vLLM's does:
   microseconds that it adds to a request at the median, by the size of the body. With and without
   take turns; the body comes in pieces of 64 KiB, as uvicorn hands them on.
2. Throughput of the real server, requests per second, with the plugin and of stock vLLM: two
   servers run at once, and rounds of the same requests go to them in turn. Reported: the median of
   the rounds' ratios. `--control` measures stock vLLM against itself: what the method is worth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import (
    MODEL_NAME,
    ServerProcess,
    server_arguments,
    server_environment,
    shipped_adapters,
)
from vllm_lego.interception import Interception

RESULTS = Path(__file__).parents[1] / "results" / "overhead"
PIECE = 1 << 16
SIZES = {"1 KB": 1 << 10, "100 KB": 100 << 10, "1 MB": 1 << 20}
GOAL_US = 50.0
GOAL_RATIO = 0.99


def main() -> int:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=2000, help="requests of each size and kind")
    parser.add_argument("--rounds", type=int, default=20, help="rounds against each server")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--clients", type=int, default=8, help="that share a round's requests")
    parser.add_argument("--no-server", action="store_true", help="the first part alone")
    parser.add_argument("--control", action="store_true", help="stock vLLM against stock vLLM")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "vllm-lego")},
        "interception": asyncio.run(_interception(options.repeats)),
    }
    if not options.no_server:
        result["server"] = asyncio.run(_servers(options))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "overhead.md").write_text(_table(result))
    print(_table(result))
    return 0


async def _interception(repeats: int) -> list[dict[str, Any]]:
    rows = []
    # All that the interception asks of the service while no request names a set: which names are
    # vLLM's adapters.
    service: Any = SimpleNamespace(catalog={"sql", "style"}, is_served=lambda _: True)
    wrapped = Interception(_application)
    wrapped.start(service, 64 << 20, ())
    for kind, text in _TEXTS.items():
        for label, size in SIZES.items():
            body = _body(text, size)
            times: dict[bool, list[float]] = {True: [], False: []}
            for i in range(2 * max(50, repeats * (1 << 10) // max(size // 16, 1 << 10))):
                plugin = i % 2 == 0
                app = wrapped if plugin else _application
                times[plugin].append(await _timed(app, body))
            with_it, without = (statistics.median(times[p]) * 1e6 for p in (True, False))
            rows.append(
                {
                    "text": kind,
                    "body": label,
                    "bytes": len(body),
                    "without_us": without,
                    "with_us": with_it,
                    "added_us": with_it - without,
                    "requests": len(times[True]),
                }
            )
    return rows


_TEXTS = {
    "English": 'The quick brown fox said "adapters" and walked on. ',
    "escaped": "Zażółć gęślą jaźń, naïve café. ",
}


def _body(text: str, size: int) -> bytes:
    """Return an ordinary chat request of about `size` bytes, as `json.dumps` writes it."""
    turn = {"role": "user", "content": text * 8}
    body = {"model": MODEL_NAME, "messages": [turn], "max_tokens": 16, "temperature": 0.2}
    body["messages"] = [turn] * max(1, size // len(json.dumps(turn)))
    return json.dumps(body).encode()


async def _timed(app: Callable[..., Awaitable[None]], body: bytes) -> float:
    pieces: Iterator[bytes] = (body[i : i + PIECE] for i in range(0, len(body), PIECE))
    left = len(body)

    async def receive() -> dict[str, Any]:
        nonlocal left
        piece = next(pieces)
        left -= len(piece)
        return {"type": "http.request", "body": piece, "more_body": left > 0}

    async def send(_: Any) -> None: ...

    started = time.perf_counter()
    await app(_SCOPE, receive, send)
    return time.perf_counter() - started


_SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "headers": [
        (b"host", b"localhost:8000"),
        (b"authorization", b"Bearer key"),
        (b"content-type", b"application/json"),
        (b"user-agent", b"benchmark"),
    ],
}


async def _application(_: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
    """Read the body as Starlette's `Request.body` does, and answer."""
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message["body"])
        more = message["more_body"]
    b"".join(pieces)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _servers(options: argparse.Namespace) -> dict[str, Any]:
    """Send rounds of short requests of the base model to both servers in turn."""
    arguments = server_arguments(embedded_model(), shipped_adapters())
    with ExitStack() as stack:
        urls = {
            plugins: stack.enter_context(
                ServerProcess(
                    arguments,
                    server_environment("" if options.control else plugins),
                    progress=print,
                )
            ).url
            for plugins in ("lego", "")
        }
        rates: dict[str, list[float]] = {plugins: [] for plugins in urls}
        async with httpx.AsyncClient(timeout=600) as client:
            for number in range(-1, options.rounds):  # the first warms up
                order = list(urls) if number % 2 else list(urls)[::-1]
                for plugins in order:
                    rate = await _round(client, urls[plugins], options)
                    if number >= 0:
                        rates[plugins].append(rate)
    ratios = [a / b for a, b in zip(rates["lego"], rates[""], strict=True)]
    return {
        "rounds": options.rounds,
        "requests_per_round": options.requests,
        "clients": options.clients,
        "with_plugin_per_s": statistics.median(rates["lego"]),
        "stock_per_s": statistics.median(rates[""]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "all": rates,
    }


async def _round(client: httpx.AsyncClient, url: str, options: argparse.Namespace) -> float:
    """Return requests per second of one round."""
    body = json.loads(_body(_TEXTS["English"], 1 << 10)) | {"max_tokens": 1, "temperature": 0}
    left = iter(range(options.requests))

    async def one_client() -> None:
        for _ in left:
            answer = await client.post(url + "/v1/chat/completions", json=body)
            answer.raise_for_status()

    started = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(options.clients)))
    return options.requests / (time.perf_counter() - started)


def _table(result: dict[str, Any]) -> str:
    lines = [
        "# What the plugin costs requests that name no set",
        "",
        f"`{result['command']}`, {result['device']}, "
        + ", ".join(f"{name} {of}" for name, of in result["versions"].items()),
        "",
        f"Microseconds at the median; goal: the plugin adds less than {GOAL_US:g} to ordinary bodies.",
        "",
        "| text | body | bytes | without | with | added |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['text']} | {row['body']} | {row['bytes']} | {row['without_us']:.1f} | "
        f"{row['with_us']:.1f} | {row['added_us']:.1f} |"
        for row in result["interception"]
    ]
    server = result.get("server")
    if server:
        low, _, high = server["ratio_quartiles"]
        lines += [
            "",
            (
                f"Requests per second of the real server, {server['clients']} clients, one token each, "
                f"median of {server['rounds']} interleaved rounds of {server['requests_per_round']}: "
                f"{server['with_plugin_per_s']:.2f} with the plugin, {server['stock_per_s']:.2f} stock. "
                f"Ratio {server['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}); goal: at least "
                f"{GOAL_RATIO:g}."
            ),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
