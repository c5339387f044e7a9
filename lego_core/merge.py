"""Merge LoRA adapters: the whole algorithm in one short function, `merge_adapters`."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, overload

import torch

from lego_core.adapter import DTYPES, LoraAdapter, LoraModule, content_digest
from lego_core.config import MergeConfig
from lego_core.errors import ConfigError, IncompatibleAdaptersError
from lego_core.methods import METHODS
from lego_core.plan import Group, plan_merge
from lego_core.pool import Units, open_pool
from lego_core.scale import scaled
from lego_core.threads import one_thread
from lego_core.units import Merged, disassemble, refuse_overflow

_HUB_NAME = re.compile(r"(?![.-])[\w.-]+/(?![.-])[\w.-]+")

ALGORITHM_VERSION = 2
"""Raised whenever the same inputs would give other numbers: it is part of a merge's identity."""


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One merged module.

    Attributes:
        rank: k.
        cluster_sizes: of its non-empty clusters, largest first; empty for methods that do not
            cluster.
        fidelity: the cosine between the merge and the exact weighted sum.
    """

    rank: int
    cluster_sizes: tuple[int, ...]
    fidelity: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        modules: by module name.
        fidelity: <M, S> / (|M| |S|) of merge M and exact weighted sum S over all modules, from
            -1 to 1; 1 means that M is S up to one scale.
        seconds: time by phase: `disassemble` (form the inner products), `reassemble` (decide and
            make the merged units), on a CUDA device as that measures it, and `total`, wall time.
    """

    modules: Mapping[str, ModuleReport]
    fidelity: float
    seconds: Mapping[str, float] = field(default_factory=dict)


@overload
def merge_adapters(
    adapters: Sequence[LoraAdapter],
    config: MergeConfig | None = None,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    name: str = "merged",
    report: Literal[False] = False,
) -> LoraAdapter: ...
@overload
def merge_adapters(
    adapters: Sequence[LoraAdapter],
    config: MergeConfig | None = None,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    name: str = "merged",
    report: Literal[True],
) -> tuple[LoraAdapter, MergeReport]: ...
def merge_adapters(
    adapters: Sequence[LoraAdapter],
    config: MergeConfig | None = None,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    name: str = "merged",
    report: bool = False,
) -> LoraAdapter | tuple[LoraAdapter, MergeReport]:
    """Merge adapters of any ranks into one of uniform rank `config.rank` and scaling 1.

    The result does not depend on the order of the adapters. A member of weight 0 has no
    influence. Modules with fewer units than the rank are padded with zero units.

    Args:
        adapters: at least one, all of one base model. They may touch different modules.
        config: how to merge; `MergeConfig()` by default.
        weights: one finite number per adapter, of any sign; 1 each by default.
        device: where to compute and to leave the result; where the first adapter lies by default.
        dtype: of the result; by default the narrowest that holds all members' tensors. Sums
            are formed in float32 or wider whatever it is.
        name: of the result.
        report: also return a `MergeReport`.

    Returns:
        The merged adapter, and the report if asked for.

    Raises:
        AdapterFormatError: tensors or scalings that are not what `LoraModule` says.
        ConfigError: no adapters, weights that do not fit them, or a device or dtype that cannot be.
        IncompatibleAdaptersError: adapters of different base models or shapes, or numbers that
            overflow.
    """
    started = time.perf_counter()
    if config is None:
        config = MergeConfig()
    if not isinstance(config, MergeConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; it must be a MergeConfig, which "
            "MergeConfig.from_mapping makes of a mapping"
        )
    method = METHODS[config.method]
    members = _in_canonical_order(adapters, weights)
    sources = [adapter for adapter, _ in members]
    gains = [weight for _, weight in members]
    _check_base_models(sources)
    # With its index, as the device of a tensor has one.
    wanted = _device_of(sources[0]) if device is None else _usable(device)
    target = torch.empty(0, device=wanted).device
    if dtype is None:
        dtype = sources[0].dtype
        for source in sources[1:]:
            dtype = torch.promote_types(dtype, source.dtype)
    if dtype not in DTYPES:
        wanted_dtypes = ", ".join(map(str, DTYPES))
        raise ConfigError(f"dtype is {dtype}; it must be one of {wanted_dtypes}", param="dtype")

    clock = _Clock(target)
    outcomes: list[tuple[Units, Merged]] = []
    # A merge that is to be scaled is not rounded before.
    computed = dtype if config.scale == "none" else torch.promote_types(dtype, torch.float32)
    with one_thread(target), torch.no_grad():
        for group in plan_merge(sources):
            pool = open_pool(group, sources, target, method.needs)
            units = disassemble(
                pool,
                sources,
                gains,
                balance=method.balance(config),
                peaks=method.needs_peaks(config),
            )
            clock.lap("disassemble")
            outcomes.append((units, method.merge(units, config, computed)))
            clock.lap("reassemble")
        if config.scale != "none":
            outcomes = scaled(outcomes, gains, config.scale, dtype)
            clock.lap("reassemble")

    merged = LoraAdapter(
        name=name,
        modules=_modules(outcomes),
        base_model=next((s.base_model for s in sources if s.base_model), None),
    )
    for units, outcome in outcomes:
        _check_finite(units.group, outcome)
    if not report:
        return merged
    seconds = clock.seconds() | {"total": time.perf_counter() - started}
    return merged, _report(outcomes, config.rank, seconds)


def _modules(outcomes: Sequence[tuple[Units, Merged]]) -> dict[str, LoraModule]:
    modules: dict[str, LoraModule] = {}
    for units, outcome in outcomes:
        for block, (a, b) in zip(units.group.blocks, outcome.factors.blocks, strict=True):
            for name, lora_a, lora_b in zip(block.names, a.unbind(), b.unbind(), strict=True):
                modules[name] = LoraModule(lora_a, lora_b, is_embedding=block.is_embedding)
    return {name: modules[name] for name in sorted(modules)}


class _Clock:
    """Time by phase: of the device where that is CUDA, which a wall clock runs ahead of."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """End a phase that began where the last one ended."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the time spent in each phase, once the device is done."""
        phases: dict[str, float] = {}
        for (_, start), (phase, end) in pairwise(self._marks):
            took = start.elapsed_time(end) * 1e-3 if self._on_cuda else end - start
            phases[phase] = phases.get(phase, 0.0) + took
        return phases

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _in_canonical_order(
    adapters: Sequence[LoraAdapter], weights: Sequence[float] | None
) -> list[tuple[LoraAdapter, float]]:
    adapters = list(adapters)
    if not adapters:
        raise ConfigError("no adapters to merge: give at least one")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters but {len(weights)} weights: give one each")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not isinstance(adapter, LoraAdapter):
            raise ConfigError(f"{adapter!r} is no LoraAdapter; load_adapter makes one of a folder")
        if not _is_finite(weight):
            raise ConfigError(
                f"adapter {adapter.name!r} has weight {weight!r}; it must be a finite number"
            )
    pairs = list(zip(adapters, map(float, weights), strict=True))
    pairs.sort(key=lambda pair: (pair[0].digest or content_digest(pair[0]), pair[0].name, pair[1]))
    # If all weights are 0 the zero adapter is the answer, so the members stay.
    return [pair for pair in pairs if pair[1] != 0] or pairs


def _check_base_models(adapters: Sequence[LoraAdapter]) -> None:
    """Compare hub names only: the path of a local copy says nothing about the model in it."""
    named = [a for a in adapters if a.base_model and _HUB_NAME.fullmatch(a.base_model)]
    for adapter in named[1:]:
        if adapter.base_model != named[0].base_model:
            raise IncompatibleAdaptersError(
                f"adapter {adapter.name!r} was trained on {adapter.base_model!r}, adapter "
                f"{named[0].name!r} on {named[0].base_model!r}; only adapters of one base model "
                "merge. If these are one, let base_model_name_or_path in their "
                "adapter_config.json say so"
            )


def _is_finite(weight: object) -> bool:
    try:
        return isinstance(weight, Real) and math.isfinite(weight)
    except OverflowError:  # an integer beyond all floats
        return False


def _check_finite(group: Group, outcome: Merged) -> None:
    """Wait for a merge, and see that it fits its dtype.

    Raises:
        IncompatibleAdaptersError: it does not.
    """
    if outcome.factors.is_finite():
        return
    names = iter(group.names)
    for a, b in outcome.factors.blocks:
        for lora_a, lora_b, name in zip(a, b, names, strict=False):
            if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
                raise IncompatibleAdaptersError(
                    f"module {name!r}: the merge overflows {lora_a.dtype}; give its members smaller "
                    "weights"
                )


def _usable(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device is {device!r}: {reason}", param="device") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(target.type, 0)
    if (target.index or 0) >= count:
        raise ConfigError(
            f"device is {str(target)!r}; a merge is made on the CPU or a CUDA device, of which there "
            f"are {torch.cuda.device_count()} here",
            param="device",
        )
    return target


def _device_of(adapter: LoraAdapter) -> torch.device:
    return next(iter(adapter.modules.values())).lora_a.device


def _report(
    outcomes: Sequence[tuple[Units, Merged]], rank: int, seconds: Mapping[str, float]
) -> MergeReport:
    modules: dict[str, ModuleReport] = {}
    sums = [0.0, 0.0, 0.0]
    for units, outcome in outcomes:
        names = units.group.names
        sizes = [[]] * len(names) if outcome.sizes is None else outcome.sizes.long().tolist()
        moments = outcome.moments()
        overlap = moments.overlap.sum(dim=1)
        rows = torch.stack([overlap, moments.merged_square, moments.sum_square]).T.tolist()
        for name, of_module, row in zip(names, sizes, rows, strict=True):
            if not math.isfinite(row[2]):
                refuse_overflow(name)
            filled = tuple(sorted((size for size in of_module if size), reverse=True))
            modules[name] = ModuleReport(rank, filled, _cosine(*row))
            sums = [total + value for total, value in zip(sums, row, strict=True)]
    return MergeReport(modules, _cosine(*sums), seconds)


def _cosine(dot: float, square: float, other_square: float) -> float:
    if square <= 0 or other_square <= 0:
        return 1.0 if square <= 0 and other_square <= 0 else 0.0
    return max(-1.0, min(1.0, dot / math.sqrt(square) / math.sqrt(other_square)))
