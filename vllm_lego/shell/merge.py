"""Merge LoRA adapters into one of uniform rank, a PEFT folder that peft and vLLM load unchanged."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lego_core import (
    AdapterWriteError,
    ConfigError,
    LoraAdapter,
    MergeConfig,
    MergeReport,
    check_shapes,
    merge_adapters,
    save_adapter,
)
from lego_core.adapter_io import CONFIG_FILE
from lego_core.provenance import merge_provenance
from vllm_lego.shell.console import print_table, progress, say, sized
from vllm_lego.shell.flags import add_common, add_config, config_of
from vllm_lego.shell.sources import Source, parse_sources

_DTYPES = ("float32", "float16", "bfloat16")
_COMBINATIONS = 3


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_common(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the adapter that is in DIR; nothing but an adapter is ever replaced",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the result (default: the narrowest that holds all adapters)",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="folder of the base model, or its config.json: check the adapters' shapes against it "
        "(needs transformers)",
    )
    add_config(parser)


@dataclass(frozen=True, slots=True)
class _Task:
    sources: Sequence[Source]
    weights: Sequence[float]
    config: MergeConfig
    arguments: argparse.Namespace


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the command line; returns the work.

    Raises:
        LegoError: it makes no sense.
    """
    sources = parse_sources(arguments.sources, arguments.revision)
    task = _Task(sources, weights_of(arguments), config_of(arguments), arguments)
    return lambda: _run(task)


def weights_of(arguments: argparse.Namespace) -> list[float]:
    """Return one weight per source.

    Raises:
        ConfigError: the numbers disagree.
    """
    count = len(arguments.sources)
    weights: list[float] = arguments.weights or [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"{count} adapters but {len(weights)} weights: give one each")
    return weights


def _run(task: _Task) -> int:
    out, arguments = task.arguments.out, task.arguments
    _check_out(out, task.sources, overwrite=arguments.overwrite)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    seconds: dict[str, float] = {}
    with progress(len(task.sources) + 2) as step:
        with _timed(seconds, "read"):
            adapters: list[LoraAdapter] = []
            for source in task.sources:
                step(f"reading {source.name}")
                adapters.append(source.load())
            if arguments.base:
                check_shapes(adapters, arguments.base)
        step(f"merging {len(adapters)} adapters")
        with _timed(seconds, "merge"):
            merged, report = merge_adapters(
                adapters,
                task.config,
                weights=task.weights,
                device=arguments.device,
                dtype=dtype,
                name=out.name or "merged",
                report=True,
            )
        step(f"writing {out}")
        with _timed(seconds, "write"):
            provenance = merge_provenance(adapters, task.config, task.weights)
            save_adapter(merged, out, provenance=provenance, overwrite=arguments.overwrite)
    show = _show_json if arguments.json else _show
    show(task, adapters, merged, report, seconds)
    return 0


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def _check_out(out: Path, sources: Sequence[Source], *, overwrite: bool) -> None:
    """Refuse a taken folder before the work, and one that is no adapter whatever was asked for.

    Raises:
        AdapterWriteError: it cannot be the result's place.
    """
    try:
        inside = {entry.name: entry.is_dir() for entry in os.scandir(out)}
    except FileNotFoundError:
        return
    except OSError as error:
        raise AdapterWriteError(f"{str(out)!r} cannot be written to ({error.strerror})") from error
    if not inside:
        return
    if not overwrite:
        raise AdapterWriteError(
            f"{str(out)!r} is not empty; choose another folder, or --overwrite it"
        )
    if CONFIG_FILE not in inside or any(inside.values()):
        raise AdapterWriteError(
            f"{str(out)!r} holds other things than an adapter, which --overwrite would delete; "
            "choose another folder"
        )
    for source in sources:
        if os.path.exists(source.place) and os.path.samefile(out, source.place):  # noqa: PTH110, PTH121
            raise AdapterWriteError(
                f"{str(out)!r} is one of the adapters to merge; choose another folder"
            )


def _show(
    task: _Task,
    adapters: Sequence[LoraAdapter],
    merged: LoraAdapter,
    report: MergeReport,
    seconds: Mapping[str, float],
) -> None:
    kinds: dict[str, list[str]] = {}
    for name in merged.modules:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    rows = []
    for kind, names in kinds.items():
        fidelities = [report.modules[name].fidelity for name in names]
        rows.append(
            [
                kind,
                str(len(names)),
                _ranks(names, adapters, task.config.rank),
                f"{sum(fidelities) / len(fidelities):.3f}",
                f"{min(fidelities):.3f}",
            ]
        )
    lowest = min(module.fidelity for module in report.modules.values())
    everything = _ranks(list(merged.modules), adapters, task.config.rank)
    rows.append(
        ["all", str(len(merged.modules)), everything, f"{report.fidelity:.3f}", f"{lowest:.3f}"]
    )
    print_table(["modules", ">count", "ranks", ">fidelity", ">lowest"], rows)
    phases = ", ".join(f"{phase} {took:.2f}" for phase, took in seconds.items())
    dtype = str(merged.dtype).removeprefix("torch.")
    say("fidelity: cosine between the merge and the exact weighted sum, by kind the modules' mean")
    say(f"seconds: {phases}")
    say(f"wrote {task.arguments.out}: {task.config.method}, {dtype}, {sized(merged.nbytes)}")


def _ranks(names: Sequence[str], adapters: Sequence[LoraAdapter], rank: int) -> str:
    """Say from which ranks to which, `8+4 → 16`; `-` where an adapter lacks the modules."""
    combinations = {
        "+".join(str(a.modules[name].rank) if name in a.modules else "-" for a in adapters)
        for name in names
    }
    shown = sorted(combinations)[:_COMBINATIONS]
    more = ", …" if len(combinations) > _COMBINATIONS else ""
    return f"{', '.join(shown)}{more} → {rank}"


def _show_json(
    task: _Task,
    adapters: Sequence[LoraAdapter],
    merged: LoraAdapter,
    report: MergeReport,
    seconds: Mapping[str, float],
) -> None:
    result: dict[str, Any] = {
        "out": str(task.arguments.out),
        "adapters": [
            {
                "name": adapter.name,
                "source": adapter.source,
                "revision": adapter.revision,
                "digest": adapter.digest,
                "weight": weight,
            }
            for adapter, weight in zip(adapters, task.weights, strict=True)
        ],
        "config": task.config.as_dict(),
        "dtype": str(merged.dtype).removeprefix("torch."),
        "bytes": merged.nbytes,
        "fidelity": report.fidelity,
        "seconds": {phase: round(took, 6) for phase, took in seconds.items()},
        "modules": {
            name: {
                "ranks": [a.modules[name].rank if name in a.modules else None for a in adapters],
                "rank": module.rank,
                "cluster_sizes": list(module.cluster_sizes),
                "fidelity": module.fidelity,
            }
            for name, module in report.modules.items()
        },
    }
    say(json.dumps(result))
