"""A soak: many more sets than any tier holds, asked for by many clients, and nothing goes wrong.

    .venv/bin/python -m benchmarks.serving.soak            # 10,000 requests, 1,000 sets, 16 clients
    .venv/bin/python -m benchmarks.serving.soak --smoke    # for CI

A small random Llama with 64 adapters and budgets so tiny that device, host memory and store evict
all the time. Checked, and said in the exit code:

- no request gets an error;
- the answers of spot-checked sets are those of a fresh server that merges each of them alone;
- the server's resident memory stays within 5% of what it was after a fifth of the requests;
- the counters add up, and every tier stays within its budget.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import LEGO_SERVE, ServerProcess, server_environment

RESULTS = Path(__file__).parents[1] / "results" / "serving"
ADAPTERS = 64
RANK = 8
DEVICE_BYTES, HOST_BYTES, STORE_BYTES = 2 << 20, 3 << 20, 6 << 20
MEMORY_GROWTH = 1.05

AdapterSet = list[dict[str, Any]]


@dataclass(slots=True)
class Soak:
    """What was asked, what came back."""

    sets: list[AdapterSet]
    answers: dict[int, set[tuple[str, ...]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    done: int = 0
    memory: dict[int, int] = field(default_factory=dict)  # resident bytes by requests done


def main() -> int:
    """Run the soak. Returns 1 when a check failed."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--sets", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--spot-checks", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a short run, memory not judged")
    options = parser.parse_args()
    if options.smoke:
        options.requests, options.sets, options.spot_checks = 400, 100, 15
    soak = Soak(_sets(options.sets))
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        arguments = _arguments(Path(folder))
        tiny = [
            f"--device-cache-bytes={DEVICE_BYTES}",
            f"--host-cache-bytes={HOST_BYTES}",
            f"--store-dir={folder}/store",
            f"--store-bytes={STORE_BYTES}",
        ]
        with _server([*arguments, *tiny]) as server:
            asyncio.run(_soak(soak, server, options))
            metrics, merges = _metrics(server), _listed(server)
        checked = sorted(soak.answers)[: options.spot_checks]
        with _server(arguments) as server:
            wrong = asyncio.run(_wrong(soak, server, checked))
    checks = {
        "no error": not soak.errors,
        "answers are those of a server that merges alone": not wrong,
        **_counters(metrics, merges, options.requests),
    }
    if not options.smoke:
        checks["memory is flat"] = _flat(soak.memory, options.requests // 5)
    report = {
        "command": " ".join(["python -m benchmarks.serving.soak", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started, 1),
        "requests": soak.done,
        "spot_checks": len(checked),
        "checks": checks,
        "errors": Counter(soak.errors).most_common(5),
        "wrong": wrong[:5],
        "resident_bytes_after_requests": soak.memory,
        "metrics": metrics,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if all(checks.values()) else 1


def _sets(count: int) -> list[AdapterSet]:
    draws = random.Random(0)  # noqa: S311
    return [
        [
            {"name": f"adapter{i}", "weight": draws.choice([0.5, 1.0, 2.0])}
            for i in draws.sample(range(ADAPTERS), draws.choice([2, 3, 4]))
        ]
        for _ in range(count)
    ]


async def _soak(soak: Soak, server: ServerProcess, options: argparse.Namespace) -> None:
    draws = random.Random(1)  # noqa: S311
    # Some sets are asked for often, most rarely, as it is in life.
    popularity = [1 / (1 + i) ** 0.7 for i in range(len(soak.sets))]
    order = draws.choices(range(len(soak.sets)), popularity, k=options.requests)
    waiting = iter(order)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            for number in waiting:
                tokens = await _ask(http, soak.sets[number])
                if isinstance(tokens, str):
                    soak.errors.append(tokens)
                else:
                    soak.answers.setdefault(number, set()).add(tokens)
                soak.done += 1
                if soak.done % max(1, options.requests // 50) == 0:
                    soak.memory[soak.done] = _resident_bytes(server)
                    print(f"  {soak.done} requests, {len(soak.errors)} errors", flush=True)

    await asyncio.gather(*(client() for _ in range(options.clients)))


async def _wrong(soak: Soak, server: ServerProcess, checked: Sequence[int]) -> list[str]:
    """Ask a server for sets one after the other. Returns what the soak answered otherwise."""
    wrong = []
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
        for number in checked:
            alone = await _ask(http, soak.sets[number])
            if soak.answers[number] != {alone}:
                wrong.append(f"{soak.sets[number]}: {soak.answers[number]}, alone {alone}")
    return wrong


async def _ask(http: httpx.AsyncClient, wanted: AdapterSet) -> tuple[str, ...] | str:
    """Return the greedy tokens of an answer, or what went wrong."""
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "adapters": wanted,
    }
    try:
        answer = await http.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    if answer.status_code != 200:
        return f"{answer.status_code}: {answer.text[:300]}"
    return tuple(answer.json()["choices"][0]["logprobs"]["tokens"])


def _counters(
    metrics: dict[str, float], merges: list[dict[str, Any]], requests: int
) -> dict[str, bool]:
    def value(name: str, label: str = "") -> float:
        return metrics.get(f"vllm_lego_{name}{label}", 0.0)

    made = value("merge_seconds_count", '{phase="total"}')
    fetched = value("cache_hits_total", '{tier="host"}') + value(
        "cache_hits_total", '{tier="disk"}'
    )
    on_device = [merge for merge in merges if merge["tier"] == "device"]
    results = {
        r: value("requests_total", f'{{result="{r}"}}') for r in ("hit", "miss", "coalesced")
    }
    budgets = {"device": DEVICE_BYTES, "host": HOST_BYTES, "disk": STORE_BYTES}
    return {
        "every request is counted once": sum(results.values()) == requests,
        "every miss is a merge": made >= results["miss"],
        "what came to the device is there or was evicted": made + fetched
        == value("cache_entries", '{tier="device"}')
        + value("cache_evictions_total", '{tier="device"}'),
        "the listing agrees": len(on_device) == value("cache_entries", '{tier="device"}'),
        "every tier evicted": all(
            value("cache_evictions_total", f'{{tier="{t}"}}') for t in budgets
        ),
        "every tier is within its budget": all(
            value("cache_bytes", f'{{tier="{t}"}}') <= budget for t, budget in budgets.items()
        ),
        "nothing is left in progress": value("merges_in_progress") == 0,
        "no error is counted": not any(
            n for name, n in metrics.items() if name.startswith("vllm_lego_errors_total")
        ),
    }


def _flat(memory: dict[int, int], after: int) -> bool:
    settled = [nbytes for done, nbytes in sorted(memory.items()) if done >= after]
    return max(settled) <= MEMORY_GROWTH * settled[0]


def _metrics(server: ServerProcess) -> dict[str, float]:
    found = re.findall(
        r"^(vllm_lego_\S+) (\S+)$", httpx.get(server.url + "/metrics").text, re.MULTILINE
    )
    return {
        name: float(value) for name, value in found if not re.search(r"_bucket|_created|_sum", name)
    }


def _listed(server: ServerProcess) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = httpx.get(server.url + "/v1/adapters/merged").json()["data"]
    return listed


def _resident_bytes(server: ServerProcess) -> int:
    """Return the resident memory of the server's process and all below it, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == server.session:
                pages = int((folder / "statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it has ended
            continue
    return total


def _arguments(folder: Path) -> list[str]:
    shape = SHAPES["tiny"]
    adapters = write_adapters(shape, folder, ADAPTERS, RANK)
    return [
        str(write_model(shape, folder / "model", embedded_model(), weights=True)),
        "--dtype=float32",  # a batch of another size adds in another order
        "--enforce-eager",
        "--max-model-len=256",
        "--max-num-seqs=16",
        "--gpu-memory-utilization=0.2",
        "--max-loras=4",
        f"--max-lora-rank={RANK}",
        "--disable-uvicorn-access-log",
        "--lora-modules",
        *(f"{name}={path}" for name, path in adapters.items()),
    ]


def _server(arguments: Sequence[str]) -> ServerProcess:
    return ServerProcess(arguments, server_environment(), command=LEGO_SERVE, progress=print)


if __name__ == "__main__":
    sys.exit(main())
