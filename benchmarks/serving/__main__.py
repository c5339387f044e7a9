"""What does serving sets of adapters cost, against stock vLLM serving single adapters?

    .venv/bin/python -m benchmarks.serving --smoke                       # CPU: does it run?
    .venv/bin/python -m benchmarks.serving --shape 8b                    # GPU, random weights
    .venv/bin/python -m benchmarks.serving --shape 1b --only S6

A server with the plugin and stock vLLM run beside each other and are measured in turn. Adapters of
the same rank, on all linear layers; sets are of three. A ratio is plugin / stock of one round.

    S1   a warm set against one native adapter
    S2   four warm sets against four native adapters in a batch, and the base model beside them
    S3   gaps in running streams of the base model while cold sets arrive, against stock vLLM
         loading single adapters one after the other
    S4   the first token of a cold set, by where its members are, or in the store; against stock
         vLLM loading one adapter
    S5   requests that name no set
    S6   sets drawn by Zipf's law (s = 1), none of them merged before but of known members, against
         as many single adapters that stock vLLM holds in host memory, by the same law; only when
         asked for, it starts servers of its own
    S8   memory that the plugin has taken by the end, against its budgets and what comes on top while
         it reads and merges, as deploy/SIZING.md has it; on the host beyond what stock vLLM had at
         the start without adapters, on the device beyond what was in use before the first set

S7, a merge alone, is `python -m benchmarks.merge`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import torch

from benchmarks.serving import peers, traffic
from benchmarks.serving.figures import Figures
from benchmarks.serving.load import join_with
from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from benchmarks.serving.tables import (
    JOINING,
    KNOWN,
    NATIVES,
    ON_DEVICE,
    PLAIN,
    STORED,
    Comparison,
)
from benchmarks.serving.traffic import Load
from deploy.sizing import Model
from lego_core.adapter_files import WEIGHTS_FILE
from vllm_lego.demo.model import embedded_model
from vllm_lego.settings import Settings
from vllm_lego.tiers import READERS

RESULTS = Path(__file__).parents[1] / "results" / "serving"
DEFAULT = ("S1", "S2", "S3", "S4", "S5", "S8")


def main() -> int:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--only", nargs="+", choices=[*DEFAULT, "S6"], default=DEFAULT)
    parser.add_argument("--rank", type=int, default=16, help="of adapters and of merges")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256], help="in S1")
    parser.add_argument("--joins", type=int, default=8, help="requests that join in S3")
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt and answer")
    parser.add_argument("--in-host", type=int, default=64, help="adapters that host memory holds")
    parser.add_argument("--sets", type=int, default=1000, help="in S6")
    parser.add_argument("--requests", type=int, default=2000, help="in S6")
    parser.add_argument("--limit-s", type=float, default=1500, help="start nothing after this time")
    parser.add_argument("--gpus", nargs=2, help="one for each server; by default they share one")
    parser.add_argument("--server-args", default="", help="more arguments of both `vllm serve`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a short run that proves it works")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.rank, options.rounds = "smollm2", 8, 1
        options.joins, options.tokens, options.streams = 2, 8, [1, 4]
        options.sets, options.requests, options.in_host = 12, 48, 20
    figures = Figures(options.out, _about(options))
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(_run(options, figures, Path(folder))))
    print(figures.save())
    figures.draw()
    missing = set(options.only) - figures.tables()
    if missing:
        print(f"not measured within {options.limit_s:g} s: {', '.join(sorted(missing))}")
    return 1 if missing else 0


@dataclass(frozen=True, slots=True)
class Run:
    """What all tables share. `folder` is for files that go when the run ends."""

    options: argparse.Namespace
    figures: Figures
    folder: Path
    model: Path
    arguments: Sequence[str]
    end: float

    def adapters(self, count: int) -> dict[str, Path]:
        """Write random adapters, fresh ones. Returns their folders by name."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return write_adapters(SHAPES[self.options.shape], folder, count, self.options.rank)


def _run(options: argparse.Namespace, figures: Figures, folder: Path) -> Run:
    model = embedded_model()
    tiny, real = options.shape == "tiny", options.shape == "smollm2"
    if not real:
        model = write_model(SHAPES[options.shape], folder / "model", model, weights=tiny)
    arguments = [
        f"--max-num-seqs={max(*options.streams, 64) + options.joins}",
        "--max-loras=8",
        f"--max-lora-rank={options.rank}",
        *([] if tiny or real else ["--load-format=dummy"]),
        *shlex.split(options.server_args),
    ]
    end = time.monotonic() + options.limit_s
    return Run(options, figures, folder, model, arguments, end)


async def _measure(run: Run) -> None:
    if wanted := [table for table in run.options.only if table != "S6"]:
        await _compare(run, wanted)
    if "S6" in run.options.only and time.monotonic() < run.end:
        await _popularity(run)


async def _compare(run: Run, wanted: Sequence[str]) -> None:
    options, rounds = run.options, run.options.rounds
    adapters = run.adapters(KNOWN + 3 * rounds * (options.joins + STORED))
    natives = {f"native{i}": path for i, path in enumerate(list(adapters.values())[:NATIVES])}
    unit = _bytes_of(adapters)
    budgets = {"device": ON_DEVICE * unit, "host": options.in_host * unit}
    settings = {
        "VLLM_LEGO_DEVICE_CACHE_BYTES": str(budgets["device"]),
        "VLLM_LEGO_HOST_CACHE_BYTES": str(budgets["host"]),
        "VLLM_LEGO_STORE_DIR": str(run.folder / "store"),
    }
    # What deploy/SIZING.md says comes on top, while adapters are read and merges are made.
    threads, shape = (
        Settings().merge_threads,
        Model.of(json.loads((run.model / "config.json").read_text())),
    )
    budgets["host"] += (READERS + threads) * unit
    budgets["device"] += threads * shape.merging(JOINING, options.rank, tuple(shape.linears))
    if not torch.cuda.is_available():
        budgets["host"] += budgets["device"]  # it is the same memory
    with peers.running(
        run.model, natives, adapters, settings, run.arguments, run.options.gpus
    ) as both:
        async with Comparison(options, run.figures, both, adapters, budgets) as comparison:
            await comparison.warm_up()
            for _ in range(rounds):
                for table in wanted:
                    if table != "S8" and time.monotonic() < run.end:
                        await comparison.measure(table)
            if "S8" in wanted:
                await comparison.measure("S8")


async def _popularity(run: Run) -> None:
    """S6. Stock vLLM holds the adapters under as many names as there are sets.

    As those are loaded at its start, members are read before the plugin is measured; sets are not.
    What stands in line for a slot has room on the device.
    """
    options = run.options
    streams, tokens = min(64, max(options.streams)), options.tokens
    adapters = run.adapters(min(64, options.sets))
    paths = list(adapters.values())
    natives = {f"native{i}": paths[i % len(paths)] for i in range(options.sets)}
    host = round(1.1 * (options.sets + len(adapters)) * _bytes_of(adapters))
    settings = {
        "VLLM_LEGO_DEVICE_CACHE_BYTES": str(2 * streams * _bytes_of(adapters)),
        "VLLM_LEGO_HOST_CACHE_BYTES": str(host),
    }
    arguments = [*run.arguments, f"--max-cpu-loras={max(8, options.sets)}"]
    draws = random.Random(0)  # noqa: S311
    popular = [1 / (1 + i) for i in range(options.sets)]
    order = draws.choices(range(options.sets), popular, k=options.requests)
    sets = [{"adapters": draws.sample(list(adapters), 3)} for _ in range(options.sets)]
    members = [{"name": name, "weight": 0.5} for name in adapters]
    with peers.running(run.model, natives, adapters, settings, arguments, options.gpus) as both:
        first = [{"adapters": members[i : i + JOINING]} for i in range(0, len(members), JOINING)]
        for server, targets in ((both.lego, first), (both.stock, [{"model": "native0"}])):
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
                for target in targets:
                    await join_with(target)(client)
        served = []
        for server, targets in (
            (both.lego, [sets[i] for i in order]),
            (both.stock, [{"model": f"native{i}"} for i in order]),
        ):
            load = Load(targets, options.requests, streams, tokens, tokens, PLAIN)
            served.append(await traffic.serve(server.url, peers.MODEL, load))
            print(f"  S6: {served[-1].throughput:.4g} tokens/s", flush=True)
        lego, stock = served
    measures = {
        "throughput": ("tokens/s", ">= 0.9", lego.throughput, stock.throughput),
        "first token, p99": ("ms", "<= 1.1", lego.ttft_ms(0.99), stock.ttft_ms(0.99)),
    }
    run.figures.add("S6", f"{options.requests} requests, {options.sets} sets", measures)


def _bytes_of(adapters: Mapping[str, Path]) -> int:
    first = next(iter(adapters.values()))
    return (first / WEIGHTS_FILE).stat().st_size


def _about(options: argparse.Namespace) -> dict[str, object]:
    return {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "torch", "vllm-lego")},
        "options": {k: str(v) for k, v in vars(options).items()},
    }


if __name__ == "__main__":
    sys.exit(main())
