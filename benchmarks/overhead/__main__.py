"""What does the plugin cost a request, beside computing it?

    .venv/bin/python -m benchmarks.overhead            # both parts, two servers
    .venv/bin/python -m benchmarks.overhead --no-server  # the first part alone
    .venv/bin/python -m benchmarks.overhead --smoke    # does it run?

1. Requests that name no set: the interception alone, as an ASGI application around one that reads
   the body as vLLM's does. Microseconds that it adds to a request at the median, by the size of the
   body. With and without take turns; the body comes in pieces of 64 KiB, as uvicorn hands them on.
2. The real server on a tiny model, with the plugin and stock vLLM: two servers run at once, and
   rounds of requests go to them in turn, for the base model, and for a set that is ready against one
   adapter. Requests per second, and the CPU time of the API server for each, which other processes
   disturb less. Reported: the median of the rounds' ratios. `--control` measures stock vLLM against
   itself: what the method is worth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from vllm_lego.catalog import Catalog
from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import (
    MAX_LORA_RANK,
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
    parser.add_argument("--smoke", action="store_true", help="a short run that proves it works")
    options = parser.parse_args()
    if options.smoke:
        options.repeats, options.rounds, options.requests = 50, 2, 8
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "vllm-lego")},
        "interception": asyncio.run(_interception(options.repeats)),
    }
    if not options.no_server:
        result["servers"] = asyncio.run(_servers(options))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "overhead.md").write_text(_table(result))
    print(_table(result))
    return 0


async def _interception(repeats: int) -> list[dict[str, Any]]:
    rows = []
    # All that the interception asks of the service while no request names a set: which names are
    # vLLM's adapters.
    catalog = Catalog({name: str(folder) for name, folder in shipped_adapters().items()})
    service: Any = SimpleNamespace(
        catalog=catalog, is_served=lambda _: True, is_base_model=lambda name: name == MODEL_NAME
    )
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


async def _servers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Send rounds of short requests to both servers in turn."""
    base = {"model": MODEL_NAME}
    loads = {"the base model": (base, base)}
    if not options.control:
        set_of_three = base | {"adapters": ["adapter0", "adapter1", "adapter2"]}
        loads["a set of three that is ready; one adapter"] = (set_of_three, {"model": "adapter0"})
    with ExitStack() as stack:
        # A model that takes no time, so that a request costs what the front end does.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = write_model(SHAPES["tiny"], folder / "model", embedded_model(), weights=True)
        adapters = write_adapters(SHAPES["tiny"], folder / "adapters", 3, MAX_LORA_RANK)
        arguments = server_arguments(model, adapters)
        plugin, stock = (
            stack.enter_context(
                ServerProcess(arguments, server_environment(plugins), progress=print)
            )
            for plugins in ("" if options.control else "lego", "")
        )
        rounds: dict[str, list[tuple[_Round, _Round]]] = {load: [] for load in loads}
        async with httpx.AsyncClient(timeout=600) as client:
            for number in range(-1, options.rounds):  # the first warms up
                for load, (of_plugin, of_stock) in loads.items():
                    turns = [(plugin, of_plugin), (stock, of_stock)]
                    order = turns if number % 2 else turns[::-1]
                    took = [await _round(client, *turn, options) for turn in order]
                    if number >= 0:
                        rounds[load].append(
                            (took[0], took[1]) if number % 2 else (took[1], took[0])
                        )
    return [
        {
            "load": load,
            "rounds": options.rounds,
            "requests_per_round": options.requests,
            "clients": options.clients,
            **_compared("per_s", [(a.per_s, b.per_s) for a, b in both]),
            **_compared("cpu_us", [(a.cpu_us, b.cpu_us) for a, b in both]),
        }
        for load, both in rounds.items()
    ]


@dataclass(frozen=True, slots=True)
class _Round:
    """Requests per second, and CPU time of the API server for each, in microseconds."""

    per_s: float
    cpu_us: float


def _compared(measure: str, rounds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Compare medians of rounds. CPU time is counted in hundredths of a second: a round's is coarse."""
    ratios = [plugin / stock for plugin, stock in rounds]
    return {
        f"{measure}_plugin": statistics.median(plugin for plugin, _ in rounds),
        f"{measure}_stock": statistics.median(stock for _, stock in rounds),
        f"{measure}_ratio": statistics.median(ratios),
        f"{measure}_ratio_quartiles": statistics.quantiles(ratios, n=4),
        f"{measure}_all": rounds,
    }


async def _round(
    client: httpx.AsyncClient,
    server: ServerProcess,
    fields: Mapping[str, Any],
    options: argparse.Namespace,
) -> _Round:
    body = {"prompt": _TEXTS["English"] * 16, "max_tokens": 1, "temperature": 0, **fields}
    left = iter(range(options.requests))
    process = psutil.Process(server.session)  # whose leader is the API server

    async def one_client() -> None:
        for _ in left:
            answer = await client.post(server.url + "/v1/completions", json=body)
            answer.raise_for_status()

    before, started = process.cpu_times(), time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(options.clients)))
    seconds, after = time.perf_counter() - started, process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return _Round(options.requests / seconds, cpu_s / options.requests * 1e6)


def _table(result: dict[str, Any]) -> str:
    lines = [
        "# What the plugin costs a request",
        "",
        f"`{result['command']}`, {result['device']}, "
        + ", ".join(f"{name} {of}" for name, of in result["versions"].items()),
        "",
        (
            "Requests that name no set: microseconds at the median; goal: the plugin adds less than "
            f"{GOAL_US:g} to ordinary bodies."
        ),
        "",
        "| text | body | bytes | without | with | added |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['text']} | {row['body']} | {row['bytes']} | {row['without_us']:.1f} | "
        f"{row['with_us']:.1f} | {row['added_us']:.1f} |"
        for row in result["interception"]
    ]
    servers = result.get("servers", ())
    if servers:
        of = servers[0]
        lines += [
            "",
            (
                f"The real server, {of['clients']} clients, one token each, medians of {of['rounds']} "
                f"interleaved rounds of {of['requests_per_round']}; goal: at least {GOAL_RATIO:g} of the "
                "requests per second."
            ),
            "",
            "| | measure | plugin | stock | ratio (quartiles) |",
            "| --- | --- | --- | --- | --- |",
        ]
    for row in servers:
        for measure, text in (("per_s", "requests/s"), ("cpu_us", "API server's CPU, us/request")):
            low, _, high = row[f"{measure}_ratio_quartiles"]
            lines.append(
                f"| {row['load']} | {text} | {row[f'{measure}_plugin']:.4g} | "
                f"{row[f'{measure}_stock']:.4g} | {row[f'{measure}_ratio']:.3f} "
                f"({low:.3f} to {high:.3f}) |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
