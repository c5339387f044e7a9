"""What does it cost running streams when somebody asks for a set never seen before?

    .venv/bin/python -m benchmarks.serving                                   # CPU, embedded model
    .venv/bin/python -m benchmarks.serving --shape 8b --streams 32 --joins 8  # GPU, random weights

Longest and p99 gap between the tokens of running streams of the base model, and how long who joins
waits for the first token, while

    idle      nothing else happens
    cached    requests for a set that is merged and registered join
    cold      requests for sets of three never seen before join, their members cached
    first     as `cold`, the members never seen before either (not with the embedded model)
    stock     stock vLLM, no plugin: single adapters of the same size are loaded and asked for

Requests join one after the other. Two servers, one after the other: with the plugin, and stock.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.serving import report
from benchmarks.serving.load import Join, Streams, join_after_loading, join_with, measure
from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import ServerProcess, server_environment, shipped_adapters

RESULTS = Path(__file__).parents[1] / "results" / "serving"
MODEL = "base"
EMBEDDED = "smollm2"
PLAIN_TOKENS = list(range(300, 364))  # words and parts of words in ASCII
LEGO_CONDITIONS = ("idle", "cached", "cold", "first")


@dataclass(slots=True)
class Bench:
    """One run: what is served, and what was measured so far."""

    options: argparse.Namespace
    model: Path
    adapters: dict[str, Path]
    unseen: list[str]  # not used before `first`
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    fresh: Iterator[int] = field(default_factory=lambda: count(1))

    def joins(self, condition: str) -> list[Join]:
        """Return the requests that join under a condition."""
        names = [name for name in self.adapters if name not in self.unseen]
        if condition == "idle":
            return []
        if condition == "cached":
            return [join_with({"adapters": names[:3]})] * self.options.joins
        if condition == "stock":
            paths = list(self.adapters.values())
            return [
                join_after_loading(f"fresh{next(self.fresh)}", str(paths[i % len(paths)]))
                for i in range(self.options.joins)
            ]
        joins = []
        for i in range(self.options.joins):
            if condition == "first" and len(self.unseen) < 3:
                break
            three = (
                [self.unseen.pop() for _ in range(3)]
                if condition == "first"
                else [names[(i + k) % len(names)] for k in range(3)]
            )
            new = {"name": three[0], "weight": 1 + next(self.fresh) / 1000}
            joins.append(join_with({"adapters": [new, *three[1:]]}))
        return joins

    def time_is_up(self) -> bool:
        """Whether nothing new should be started."""
        return time.monotonic() - self.started > self.options.limit_s

    def save(self) -> str:
        """Write what there is. Returns the table."""
        about = {
            "command": " ".join(["python -m benchmarks.serving", *sys.argv[1:]]),
            "device": _device(),
            "versions": {name: version(name) for name in ("vllm", "torch", "vllm-lego")},
            "options": {k: str(v) for k, v in vars(self.options).items()},
        }
        return report.write(self.options.out, about, self.rounds)


def main() -> int:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=[EMBEDDED, *SHAPES], default=EMBEDDED)
    parser.add_argument("--rank", type=int, default=16, help="of random adapters and of merges")
    parser.add_argument("--streams", type=int, default=4, help="streams that run")
    parser.add_argument("--joins", type=int, default=4, help="requests that join in each round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each condition")
    parser.add_argument(
        "--tokens", type=int, default=4000, help="of a stream, which then begins again"
    )
    parser.add_argument("--idle-s", type=float, default=3.0, help="seconds of a round of `idle`")
    parser.add_argument("--limit-s", type=float, default=1500, help="start nothing after this time")
    parser.add_argument("--server-args", default="", help="more arguments of `vllm serve`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a short run that proves it works")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.streams, options.joins, options.repeats = "tiny", 2, 2, 1
        options.idle_s = 1.0
    with tempfile.TemporaryDirectory() as folder:
        bench = _prepare(options, Path(folder))
        lego = LEGO_CONDITIONS if bench.unseen else LEGO_CONDITIONS[:3]
        for plugins, conditions in (("lego", lego), ("", ("stock",))):
            if not bench.time_is_up():
                asyncio.run(_against_one_server(bench, plugins, conditions))
    print(bench.save())
    missing = {*lego, "stock"} - set(bench.rounds)
    if missing:
        print(f"not measured within {options.limit_s:g} s: {', '.join(sorted(missing))}")
    return 1 if missing else 0


def _prepare(options: argparse.Namespace, folder: Path) -> Bench:
    if options.shape == EMBEDDED:
        adapters = shipped_adapters()
        return Bench(options, embedded_model(), adapters, [])
    shape = SHAPES[options.shape]
    weights = options.shape == "tiny"  # larger ones are served with --load-format dummy
    model = write_model(shape, folder / "model", embedded_model(), weights=weights)
    cached = max(3, options.joins)
    adapters = write_adapters(shape, folder, cached + 3 * options.joins, options.rank)
    return Bench(options, model, adapters, list(adapters)[cached:])


async def _against_one_server(bench: Bench, plugins: str, conditions: Sequence[str]) -> None:
    with _server(bench, plugins) as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
            await _warm_up(bench, client, conditions)
            for _ in range(bench.options.repeats):
                for condition in conditions:
                    joins = bench.joins(condition)
                    if bench.time_is_up() or (condition != "idle" and not joins):
                        continue
                    streams = Streams(client, _stream_fields(bench), bench.options.streams)
                    measured = await measure(client, streams, joins, bench.options.idle_s)
                    bench.rounds.setdefault(condition, []).append(measured)
                    bench.save()
                    print(f"  {condition:7} {measured}", flush=True)


def _stream_fields(bench: Bench) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": bench.options.tokens}
    if bench.options.shape != EMBEDDED:
        # Random weights go round in circles among broken bytes, which vLLM's detokenizer holds
        # back and decodes again and again.
        fields["allowed_token_ids"] = PLAIN_TOKENS
    return fields


async def _warm_up(bench: Bench, client: httpx.AsyncClient, conditions: Sequence[str]) -> None:
    """First use compiles, allocates, and reads the members of `cold` once."""
    if "stock" in conditions:
        await bench.joins("stock")[0](client)
        return
    for condition in ("cached", "cold"):
        for join in bench.joins(condition):
            await join(client)


@contextmanager
def _server(bench: Bench, plugins: str) -> Iterator[ServerProcess]:
    options = bench.options
    arguments = [
        str(bench.model),
        f"--served-model-name={MODEL}",
        "--dtype=bfloat16",
        "--max-model-len=8192",
        f"--max-num-seqs={options.streams + 8}",
        "--enable-lora",
        "--max-loras=8",
        f"--max-lora-rank={8 if options.shape == EMBEDDED else options.rank}",
    ]
    if not torch.cuda.is_available():
        arguments.append("--enforce-eager")
    if options.shape not in (EMBEDDED, "tiny"):
        arguments.append("--load-format=dummy")
    if plugins:
        named = [f"{name}={path}" for name, path in bench.adapters.items()]
        arguments += ["--lora-modules", *named]
    environment: Mapping[str, str] = server_environment(plugins)
    if not plugins:
        environment = {**environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    arguments += shlex.split(options.server_args)
    with ServerProcess(arguments, environment, progress=print) as server:
        yield server


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
