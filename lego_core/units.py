"""Step 1 and 6 of LoRA-LEGO: cut LoRAs into rank-one units, and put merged ones together.

A unit (the paper's minimal semantic unit) is one row a of A with the matching column b of B. What a
method decides is a `Mixing`: how the merged units are made of the members'. That, the fidelity
and all norms follow from the units' inner products alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from lego_core.adapter import LoraAdapter
from lego_core.errors import IncompatibleAdaptersError
from lego_core.pool import Factors, Pool, Units

_TINY = torch.finfo(torch.float64).tiny
_MAX_GAIN = torch.finfo(torch.float32).max
"""Scaling times weight beyond this is a mistake, and sums may be formed in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Mixing:
    """Merged units as sums of the members': a'_c = sum_i a[m, c, i] a_i, and b'_c likewise.

    Attributes:
        a, b: shape [M, k, N], float64.
        sizes: units per cluster, shape [M, k], for methods that cluster.
    """

    a: torch.Tensor
    b: torch.Tensor
    sizes: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What the fidelity and the scale of a merge are made of, each of shape [M], float64.

    Attributes:
        overlap: <merge, unit i> in the Frobenius inner product, shape [M, N]; its sum over i is
            <merge, sum>.
        merged_square: |merge|^2.
        sum_square: |exact weighted sum|^2.
    """

    overlap: torch.Tensor
    merged_square: torch.Tensor
    sum_square: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """The merge of one group.

    Attributes:
        factors: k units per module.
        moments: what their fidelity is made of; only reports and scale rules ask.
        sizes: units per cluster, shape [M, k], for methods that cluster.
    """

    factors: Factors
    moments: Callable[[], Moments]
    sizes: torch.Tensor | None = None


def disassemble(
    pool: Pool,
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    *,
    balance: bool,
    peaks: bool = False,
) -> Units:
    """Cut the pooled adapters into units, scaled, weighted and in the chosen gauge.

    Norms are taken in the pool's dtype, so halves below 1e-19 or above 1e19 count as zero or
    overflow in float32.

    Args:
        pool: the weights.
        adapters: as given to `plan_merge`.
        weights: one per adapter, finite, of any sign.
        balance: the gauge, see `lego_core.pool.gauge`.
        peaks: whether to find the largest entries too.

    Raises:
        IncompatibleAdaptersError: scaling times weight overflows.
    """
    group = pool.group
    with np.errstate(over="ignore"):
        gains = np.stack(
            [
                adapters[i].table.scalings[list(places)] * weights[i]
                for i, places in zip(group.members, group.places, strict=True)
            ],
            axis=1,
        )
    if not np.isfinite(gains).all():
        m, t = np.argwhere(~np.isfinite(gains))[0]
        adapter, name = adapters[group.members[t]], group.names[m]
        raise IncompatibleAdaptersError(
            f"adapter {adapter.name!r}, module {name!r}: scaling {adapter.modules[name].scaling:g} "
            f"times weight {weights[group.members[t]]:g} overflows"
        )
    return pool.disassemble(torch.from_numpy(gains), balance=balance, peaks=peaks)


def assembled(units: Units, mixing: Mixing, dtype: torch.dtype) -> Merged:
    """Make the merged units, and account for them."""
    factors = units.pool.mix((mixing.a, mixing.b), (units.coef_a, units.coef_b), dtype)
    return Merged(factors, partial(moments, units, mixing), mixing.sizes)


def moments(units: Units, mixing: Mixing) -> Moments:
    """Return what is known of a merge without its factors."""
    cross_a, cross_b = mixing.a @ units.gram_a, mixing.b @ units.gram_b
    product_a, product_b = cross_a @ mixing.a.mT, cross_b @ mixing.b.mT
    return Moments(
        overlap=(cross_a * cross_b).sum(dim=1),
        merged_square=(product_a * product_b).sum(dim=(1, 2)),
        sum_square=sum_square(units),
    )


def sum_square(units: Units) -> torch.Tensor:
    """Return |exact weighted sum|^2, shape [M]."""
    square = (units.gram_a * units.gram_b).sum(dim=(1, 2))
    # A sum whose members cancel is zero up to the rounding of the inner products.
    norms = (_diagonal(units.gram_a).clamp_min(0) * _diagonal(units.gram_b).clamp_min(0)).sqrt()
    rounding = torch.finfo(units.pool.dtype).eps ** 2 * norms.sum(dim=1).square()
    return square.where(~(square <= rounding), 0)


def refuse_overflow(name: str) -> NoReturn:
    """Say which module's numbers are too large to compute with."""
    raise IncompatibleAdaptersError(
        f"module {name!r}: scaling, weight and the adapters' numbers overflow; give the members "
        "smaller weights"
    )


def _diagonal(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal(dim1=1, dim2=2)
