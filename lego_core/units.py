"""Step 1 and 2 of LoRA-LEGO: cut LoRAs into rank-one units and fix their gauge.

A unit (the paper's minimal semantic unit) is one row a of A with the matching column b of B.
Modules of one shape, touched by the same ranks, form a `Stack`, so that each later step is one
batched operation over all of them.

Source: Zhao et al., "Merging LoRAs like Playing LEGO", ICLR 2025, arXiv 2409.16167, section 3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lego_core.adapter import LoraAdapter, LoraModule
from lego_core.errors import IncompatibleAdaptersError

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Modules that are merged together, known before any tensor is touched.

    Attributes:
        names: the M module names.
        members: indices into the adapters, for those that touch these modules.
        ranks: rank of each member, in the order of `members`.
    """

    names: tuple[str, ...]
    members: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The pooled units of M modules. Unit i of module m is

        a_i = coef_a[m, i] * a[m, i],    b_i = coef_b[m, i] * b[m, i]

    so that sum_i b_i a_i^T is exactly the weighted sum of the adapters: the coefficients hold
    scaling, weight and gauge, and the weights themselves are never rewritten.

    Attributes:
        a: shape [M, N, in_features], float32 or wider.
        b: shape [M, N, out_features], same dtype.
        coef_a, coef_b: shape [M, N], float64.
        gram_a, gram_b: inner products of the units' halves with the coefficients applied,
            shape [M, N, N], float64. Their sum is the Gram matrix of the vectors [a; b]; their
            entrywise product that of the matrices b a^T.
    """

    a: torch.Tensor
    b: torch.Tensor
    coef_a: torch.Tensor
    coef_b: torch.Tensor
    gram_a: torch.Tensor
    gram_b: torch.Tensor


def plan_stacks(adapters: Sequence[LoraAdapter]) -> list[StackPlan]:
    """Group the union of the adapters' modules by shape and by who touches them.

    Raises:
        IncompatibleAdaptersError: two adapters give one module different shapes.
    """
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        members = tuple(i for i, adapter in enumerate(adapters) if name in adapter.modules)
        ranks = tuple(adapters[i].modules[name].rank for i in members)
        first = adapters[members[0]]
        shape = _shape(first.modules[name])
        for i in members[1:]:
            other = _shape(adapters[i].modules[name])
            if other != shape:
                raise IncompatibleAdaptersError(
                    f"module {name!r}: adapter {adapters[i].name!r} updates a layer of {other[0]} inputs "
                    f"and {other[1]} outputs, adapter {first.name!r} one of {shape[0]} and {shape[1]}; "
                    "they were trained on different base models and cannot be merged"
                )
        groups[(members, ranks, shape)].append(name)
    return [
        StackPlan(tuple(names), members, ranks)  # type: ignore[arg-type]
        for (members, ranks, _shape_), names in groups.items()
    ]


def disassemble(
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    plan: StackPlan,
    *,
    balance: bool,
    device: torch.device,
) -> Stack:
    """Pool the units of `plan`'s modules, scaled, weighted and in the chosen gauge.

    Scaling and weight go to both halves, a by sqrt(|s w|), b by sign(w) sqrt(|s w|). With
    `balance` each unit is rescaled to |a| = |b|; a unit with a zero half is the zero function
    and becomes the zero vector. Norms are taken in the pool's dtype, so halves below 1e-19 or
    above 1e19 count as zero or overflow in float32.

    Args:
        adapters: as given to `plan_stacks`.
        weights: one per adapter, finite, of any sign.
        plan: which modules.
        balance: the gauge.
        device: where to pool and compute.

    Returns:
        The units, member after member, in the order of each member's ranks.

    Raises:
        IncompatibleAdaptersError: scaling times weight overflows.
    """
    modules = [[adapters[i].modules[name] for i in plan.members] for name in plan.names]
    dtype = torch.float32
    for module in (module for row in modules for module in row):
        dtype = torch.promote_types(dtype, module.lora_a.dtype)
        dtype = torch.promote_types(dtype, module.lora_b.dtype)

    def pool(halves: list[list[torch.Tensor]]) -> torch.Tensor:
        rows = [torch.cat([half.to(device, dtype) for half in row]) for row in halves]
        return torch.stack(rows)

    a = pool([[module.lora_a for module in row] for row in modules])
    b = pool([[module.lora_b.T for module in row] for row in modules])
    gains = [[_gain(adapters[i], name, weights[i]) for i in plan.members] for name in plan.names]
    gain = torch.tensor(gains, dtype=torch.float64, device=device)
    gain = gain.repeat_interleave(torch.tensor(plan.ranks, device=device), dim=1)
    coef_a = gain.abs().sqrt()
    coef_b = coef_a * gain.sign()

    raw_a = (a @ a.mT).double()
    raw_b = (b @ b.mT).double()
    if balance:
        norm_a = coef_a * _diagonal(raw_a).sqrt()
        norm_b = coef_b.abs() * _diagonal(raw_b).sqrt()
        alive = (norm_a > 0) & (norm_b > 0)
        stretch = torch.where(alive, (norm_b / norm_a.clamp_min(_TINY)).sqrt(), 0.0)
        coef_a = coef_a * stretch
        coef_b = torch.where(alive, coef_b / stretch.clamp_min(_TINY), 0.0)

    return Stack(
        a=a,
        b=b,
        coef_a=coef_a,
        coef_b=coef_b,
        gram_a=coef_a[:, :, None] * raw_a * coef_a[:, None, :],
        gram_b=coef_b[:, :, None] * raw_b * coef_b[:, None, :],
    )


def _gain(adapter: LoraAdapter, module: str, weight: float) -> float:
    gain = adapter.modules[module].scaling * weight
    if not math.isfinite(gain):
        raise IncompatibleAdaptersError(
            f"adapter {adapter.name!r}, module {module!r}: scaling "
            f"{adapter.modules[module].scaling:g} times weight {weight:g} overflows"
        )
    return gain


def _shape(module: LoraModule) -> tuple[int, int]:
    return module.in_features, module.out_features


def _diagonal(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal(dim1=1, dim2=2)
