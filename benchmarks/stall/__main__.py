"""Measure the gaps between one stream's tokens while another client asks for a set of adapters.

    .venv/bin/python -m benchmarks.stall

Conditions, interleaved and repeated against servers started by this command:

    idle      nothing else happens
    cached    a request for a set that is already merged joins
    cold      a request for a set never seen before joins
    busy      as `cold`, with a merge that computes for long: five adapters, 64 k-means restarts
    slow      as `cold`, the merge artificially lengthened by 3 s of sleep in the staging thread

If merging blocked the engine's loop, the longest gap of `slow` would exceed 3 s. `busy` shares
the cores with the model, which `slow` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, pairwise
from pathlib import Path

from openai import OpenAI

from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import (
    MODEL_NAME,
    ServerProcess,
    server_arguments,
    server_environment,
    shipped_adapters,
)

RESULTS = Path(__file__).parents[1] / "results" / "stall"
SLOW_S = 3.0
SLOW_PLUGIN = f"""
import time
import vllm_lego.worker as worker

def register():
    merge = worker.merge_adapters
    def slow_merge(*args, **kwargs):
        time.sleep({SLOW_S})
        return merge(*args, **kwargs)
    worker.merge_adapters = slow_merge
"""

_weights = count(1)


@dataclass(frozen=True, slots=True)
class Stream:
    """Gaps of one stream: milliseconds between tokens; and how long the joining client waited."""

    longest_ms: float
    p99_ms: float
    median_ms: float
    joined_ms: float | None


def main() -> int:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(prog="benchmarks.stall", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="streams per condition")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each stream")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    measured: dict[str, list[Stream]] = {}
    with _server({}) as client:
        for _ in range(options.repeats):
            for condition in ("idle", "cached", "cold", "busy"):
                stream = _measure(client, condition, options.tokens)
                measured.setdefault(condition, []).append(stream)
                print(f"  {condition:8} {stream}", flush=True)
    # The merge sleeps 3 s: the stream must last longer.
    with _slow_plugin() as environment, _server(environment) as client:
        for _ in range(options.repeats):
            stream = _measure(client, "slow", options.tokens)
            measured.setdefault("slow", []).append(stream)
            print(f"  {'slow':8} {stream}", flush=True)

    _write(options.out, measured)
    print(_table(measured))
    return 0


def _measure(client: OpenAI, condition: str, tokens: int) -> Stream:
    """Stream from the base model; a quarter of the way in, let a second client join."""
    known = {"adapters": ["numbers", "shout"]}
    if condition == "cached":
        _join(client, known)
    joined: list[float] = []
    new = {"name": "shout", "weight": 1 + next(_weights) / 1000}
    wanted: dict[str, object] | None = {
        "idle": None,
        "cached": known,
        "cold": {"adapters": ["numbers", new, "json"]},
        "slow": {"adapters": ["numbers", new, "json"]},
        "busy": {
            "adapters": ["numbers", "plural", new, "json", "signoff"],
            "merge": {"restarts": 64},
        },
    }[condition]
    thread = threading.Thread(target=lambda: joined.append(_join(client, wanted or {})))
    arrivals: list[float] = []
    for _ in client.completions.create(
        model=MODEL_NAME,
        prompt="Once upon a time",
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        arrivals.append(time.perf_counter())
        if wanted and len(arrivals) == tokens // 4:
            thread.start()
    if wanted:
        still_merging = thread.is_alive()
        thread.join()
        if still_merging:
            print("  the stream ended before the other client was answered: raise --tokens")
    gaps = sorted((b - a) * 1e3 for a, b in pairwise(arrivals))
    return Stream(
        longest_ms=round(gaps[-1], 1),
        p99_ms=round(gaps[int(0.99 * (len(gaps) - 1))], 1),
        median_ms=round(statistics.median(gaps), 1),
        joined_ms=round(joined[0] * 1e3, 1) if joined else None,
    )


def _join(client: OpenAI, wanted: dict[str, object]) -> float:
    """Ask for one token from a set. Returns seconds."""
    started = time.perf_counter()
    client.completions.create(
        model=MODEL_NAME,
        prompt="Once upon a time",
        max_tokens=1,
        temperature=0,
        extra_body=wanted,
    )
    return time.perf_counter() - started


@contextmanager
def _server(environment: Mapping[str, str]) -> Iterator[OpenAI]:
    arguments = server_arguments(embedded_model(), shipped_adapters())
    merged = server_environment() | environment
    with ServerProcess(arguments, merged, progress=print) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=600)
        _join(client, {"adapters": ["numbers", "plural"]})  # first use compiles and allocates
        yield client


@contextmanager
def _slow_plugin() -> Iterator[dict[str, str]]:
    """A vLLM plugin of the benchmark's own, on the path of its server only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "slow_merge.py").write_text(SLOW_PLUGIN)
        info = Path(folder, "slow_merge-0.dist-info")
        info.mkdir()
        info.joinpath("METADATA").write_text(
            "Metadata-Version: 2.1\nName: slow-merge\nVersion: 0\n"
        )
        info.joinpath("entry_points.txt").write_text(
            "[vllm.general_plugins]\nslow_merge = slow_merge:register\n"
        )
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        yield {"PYTHONPATH": path, "VLLM_PLUGINS": "lego,slow_merge"}


def _write(folder: Path, measured: Mapping[str, list[Stream]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["python -m benchmarks.stall", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("vllm", "torch", "vllm-lego")},
        "conditions": {name: [asdict(s) for s in streams] for name, streams in measured.items()},
    }
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "results.md").write_text(f"`{report['command']}`\n{_table(measured)}\n")


def _table(measured: Mapping[str, list[Stream]]) -> str:
    """Medians over the repeats, and the longest gap of each condition over that of `cached`."""
    peer = statistics.median(s.longest_ms for s in measured["cached"])
    lines = [
        "",
        "| condition | longest gap, ms (median; worst) | / cached | p99, ms | median, ms | joins after, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, streams in measured.items():
        longest = statistics.median(s.longest_ms for s in streams)
        waits = [s.joined_ms for s in streams if s.joined_ms is not None]
        lines.append(
            f"| {name} | {longest:.0f}; {max(s.longest_ms for s in streams):.0f} "
            f"| {longest / peer:.2f} "
            f"| {statistics.median(s.p99_ms for s in streams):.0f} "
            f"| {statistics.median(s.median_ms for s in streams):.0f} "
            f"| {f'{statistics.median(waits):.0f}' if waits else '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
