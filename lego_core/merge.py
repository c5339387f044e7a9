"""Merge LoRA adapters: the whole algorithm in one short function, `merge_adapters`."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import torch

from lego_core.adapter import LoraAdapter, LoraModule, content_digest
from lego_core.config import MergeConfig
from lego_core.errors import ConfigError, IncompatibleAdaptersError
from lego_core.methods import METHODS, StackMerge
from lego_core.units import StackPlan, disassemble, plan_stacks

_HUB_NAME = re.compile(r"(?![.-])[\w.-]+/(?![.-])[\w.-]+")

ALGORITHM_VERSION = 1
"""Raised whenever the same inputs would give other numbers: it is part of a merge's identity."""


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One merged module: its rank, the sizes of its non-empty clusters (largest first), and its
    fidelity, the cosine between the merge and the exact weighted sum.
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
        seconds: wall time by phase: `disassemble` (pool the units, form the Gram matrices),
            `reassemble` (cluster, average, rescale) and `total`.
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
        ConfigError: no adapters, or weights that do not fit them.
        IncompatibleAdaptersError: adapters of different base models or shapes, or numbers that
            overflow.
    """
    clock = _Clock(synchronising=report)
    config = config or MergeConfig()
    members = _in_canonical_order(adapters, weights)
    sources = [adapter for adapter, _ in members]
    gains = [weight for _, weight in members]
    _check_base_models(sources)
    target = torch.device(device) if device is not None else _device_of(sources[0])
    if dtype is None:
        dtype = sources[0].dtype
        for source in sources[1:]:
            dtype = torch.promote_types(dtype, source.dtype)

    method = METHODS[config.method]
    modules: dict[str, LoraModule] = {}
    outcomes: list[tuple[StackPlan, StackMerge]] = []
    for plan in plan_stacks(sources):
        stack = disassemble(sources, gains, plan, balance=config.balance, device=target)
        clock.lap("disassemble", target)
        outcome = method(stack, config, sum(plan.ranks) / len(plan.ranks))
        a, b = outcome.merged.a.to(dtype), outcome.merged.b.mT.contiguous().to(dtype)
        _check_finite(outcome, plan, a, b)
        modules.update(
            (module_name, LoraModule(a[m].clone(), b[m].clone()))
            for m, module_name in enumerate(plan.names)
        )
        outcomes.append((plan, outcome))
        clock.lap("reassemble", target)

    merged = LoraAdapter(
        name=name,
        modules={module_name: modules[module_name] for module_name in sorted(modules)},
        base_model=next((s.base_model for s in sources if s.base_model), None),
    )
    return (merged, _report(outcomes, clock.seconds())) if report else merged


class _Clock:
    """Wall time by phase; when synchronising, of the device too."""

    def __init__(self, *, synchronising: bool) -> None:
        self._synchronising = synchronising
        self._started = self._lapped = time.perf_counter()
        self._phases = {"disassemble": 0.0, "reassemble": 0.0}

    def lap(self, phase: str, device: torch.device) -> None:
        if self._synchronising and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        now = time.perf_counter()
        self._phases[phase] += now - self._lapped
        self._lapped = now

    def seconds(self) -> dict[str, float]:
        return self._phases | {"total": time.perf_counter() - self._started}


def _in_canonical_order(
    adapters: Sequence[LoraAdapter], weights: Sequence[float] | None
) -> list[tuple[LoraAdapter, float]]:
    if not adapters:
        raise ConfigError("no adapters to merge: give at least one")
    if weights is None:
        weights = [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters but {len(weights)} weights: give one each")
    for adapter, weight in zip(adapters, weights, strict=True):
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
        return isinstance(weight, int | float) and math.isfinite(weight)
    except OverflowError:  # an integer beyond all floats
        return False


def _check_finite(merge: StackMerge, plan: StackPlan, a: torch.Tensor, b: torch.Tensor) -> None:
    finite = torch.isfinite(a).all(dim=(1, 2)) & torch.isfinite(b).all(dim=(1, 2))
    finite &= torch.isfinite(merge.merged.sum_square)
    if not bool(finite.all()):
        module = plan.names[int(finite.to(torch.uint8).argmin())]
        raise IncompatibleAdaptersError(
            f"module {module!r}: the merge overflows {a.dtype}; give its members smaller weights"
        )


def _device_of(adapter: LoraAdapter) -> torch.device:
    return next(iter(adapter.modules.values())).lora_a.device


def _report(
    outcomes: Sequence[tuple[StackPlan, StackMerge]], seconds: Mapping[str, float]
) -> MergeReport:
    modules: dict[str, ModuleReport] = {}
    overlap = merged_square = sum_square = 0.0
    for plan, outcome in outcomes:
        sizes = outcome.sizes.long().tolist()
        sums = zip(
            outcome.merged.overlap.tolist(),
            outcome.merged.merged_square.tolist(),
            outcome.merged.sum_square.tolist(),
            strict=True,
        )
        rank = outcome.merged.a.shape[1]
        for module_name, of_module, (dot, square, exact) in zip(
            plan.names, sizes, sums, strict=True
        ):
            filled = tuple(sorted((size for size in of_module if size), reverse=True))
            modules[module_name] = ModuleReport(rank, filled, _cosine(dot, square, exact))
            overlap, merged_square, sum_square = (
                overlap + dot,
                merged_square + square,
                sum_square + exact,
            )
    return MergeReport(
        modules=modules,
        fidelity=_cosine(overlap, merged_square, sum_square),
        seconds=seconds,
    )


def _cosine(dot: float, square: float, other_square: float) -> float:
    if square <= 0 or other_square <= 0:
        return 1.0 if square <= 0 and other_square <= 0 else 0.0
    return max(-1.0, min(1.0, dot / math.sqrt(square * other_square)))
