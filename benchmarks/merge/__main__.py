"""Measure a merge against one copy of its inputs, and against scikit-learn and PEFT.

    python -m benchmarks.merge                 everything that this machine can do
    python -m benchmarks.merge --smoke         tiny shapes, seconds
    python -m benchmarks.merge --draw FILE     the picture of earlier results, no measuring

On a CUDA device: merges of Llama shapes, one thing varied at a time. On the CPU: the same with one
layer, and the peers, module by module and in alternation. On both: accuracy. The results are
written as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge.accuracy import accuracy
from benchmarks.merge.cases import Case, around
from benchmarks.merge.peers import peers
from benchmarks.merge.report import draw, table
from lego_core import LoraAdapter, MergeConfig, merge_adapters
from lego_core.methods import METHODS

RESULTS = Path(__file__).parents[1] / "results" / "merge"
PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "peft", "transformers", "vllm-lego")


def main() -> int:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(prog="benchmarks.merge", description=__doc__)
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one")
    parser.add_argument("--method", choices=list(METHODS), default="lego", help="of the merges")
    parser.add_argument("--repeats", type=int, default=20, help="timed merges of each case")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument(
        "--time-limit", type=float, default=540, help="start nothing later, seconds"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--draw", type=Path, help="a JSON file to draw")
    options = parser.parse_args()
    if options.draw:
        return draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))

    deadline = time.monotonic() + options.time_limit
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    base = Case(model="tiny") if options.smoke else Case(layers=0 if device.type == "cuda" else 1)
    repeats = min(options.repeats, 3) if options.smoke else options.repeats
    results = _header(device)
    stem = device.type if options.method == "lego" else f"{device.type}-{options.method}"
    file = options.out / f"{stem}.json"

    def put(section: str, entry: dict[str, Any]) -> None:
        results.setdefault(section, []).append(entry)
        print(json.dumps({section: entry}), flush=True)
        _write(file, results)

    cases = around(base)[:2] if options.smoke else around(base)
    measure = partial(_measure, method=options.method, device=device, repeats=repeats)
    _step(deadline, results, cases[0].name, lambda: put("merges", measure(cases[0])))
    _step(deadline, results, "accuracy", lambda: put("accuracy", accuracy(base, device)))
    if device.type == "cpu":
        modules = (
            ["self_attn.k_proj"] if options.smoke else ["self_attn.k_proj", "self_attn.q_proj"]
        )
        for module in modules:
            _step(
                deadline,
                results,
                f"peers on {module}",
                lambda name=module: put("peers", peers(base, name, min(repeats, 3))),  # type: ignore[misc]
            )
    for case in cases[1:]:
        _step(
            deadline,
            results,
            case.name,
            lambda c=case: put("merges", measure(c)),  # type: ignore[misc]
        )
    _write(file, results)
    print(table(results))
    draw(results, file.with_suffix(".png"))
    return 0


def _step(deadline: float, results: dict[str, Any], name: str, run: Callable[[], None]) -> None:
    if time.monotonic() > deadline:
        results.setdefault("left_out", []).append(f"{name}: no time")
        return
    try:
        run()
    except (torch.cuda.OutOfMemoryError, ImportError) as error:
        results.setdefault("left_out", []).append(f"{name}: {str(error).splitlines()[0]}")
        print(f"left out: {name}: {error}", flush=True)


def _measure(case: Case, *, method: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time copies of the pool and merges, in alternation after a warm-up."""
    adapters = case.build(device)
    config = MergeConfig(method=method, rank=case.k)
    pool = torch.zeros(case.pool_bytes() // 2, dtype=torch.bfloat16, device=device)
    copy_pool = partial(torch.empty_like(pool).copy_, pool)
    for _ in range(3 if device.type == "cuda" else 1):
        copy_pool()
        merge_adapters(adapters, config, report=True)
    copies, walls, phases = [], [], []
    for _ in range(repeats):
        copies.append(_timed(copy_pool, device)[1])
        walls.append(_timed(lambda: merge_adapters(adapters, config), device)[0])
        _, report = merge_adapters(adapters, config, report=True)
        phases.append(report.seconds)
    busy = statistics.median(walls)
    if device.type == "cuda":
        busy = _busy(lambda: merge_adapters(adapters, config), device)
    del pool, copy_pool
    extra = _extra_bytes(adapters, config, device)
    copy = statistics.median(copies)
    return {
        "case": case.name,
        "method": method,
        "model": case.model,
        "adapters": case.adapters,
        "rank": case.rank,
        "k": case.k,
        "modules": case.n_modules,
        "pool_bytes": case.pool_bytes(),
        "repeats": repeats,
        "copy_ms": _spread(copies),
        "merge_wall_ms": _spread(walls),
        "merge_busy_ms": busy * 1e3,
        "phases_ms": {name: _spread([p[name] for p in phases]) for name in phases[0]},
        "wall_over_copy": statistics.median(walls) / copy,
        "busy_over_copy": busy / copy,
        "extra_bytes": extra,
        "extra_over_pool": extra / case.pool_bytes(),
    }


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return seconds by the wall clock, from idle to idle, and between events on the device."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        wall = time.perf_counter() - started
        return wall, wall
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started = time.perf_counter()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started, begin.elapsed_time(end) * 1e-3


def _busy(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the device works in one run: the sum of its kernels and copies.

    What is left of the wall time is the device waiting for the host to launch them.
    """
    runs = 5
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, cuda]) as profile:
        for _ in range(runs):
            run()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6 / runs


def _extra_bytes(adapters: list[LoraAdapter], config: MergeConfig, device: torch.device) -> int:
    """Return the highest memory in use during a merge, above what was in use before it.

    The result is part of it. On the CPU the process's resident memory, sampled each millisecond.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        merge_adapters(adapters, config)
        return torch.cuda.max_memory_allocated(device) - before
    import psutil  # noqa: PLC0415 - of the extra `benchmarks`

    process, done, seen = psutil.Process(), threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    merged = merge_adapters(adapters, config)
    seen.append(process.memory_info().rss)
    done.set()
    watcher.join()
    del merged
    return max(0, max(seen) - before)


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and largest, in milliseconds."""
    return {
        "median": statistics.median(seconds) * 1e3,
        "min": min(seconds) * 1e3,
        "max": max(seconds) * 1e3,
    }


def _header(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": " ".join(["python -m benchmarks.merge", *sys.argv[1:]]),
        "device": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
    }


def _write(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    file.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    sys.exit(main())
