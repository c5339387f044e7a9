"""Step 1, 2, 4 and 6 of LoRA-LEGO: cut LoRAs into rank-one units, fix their gauge, put them together.

A unit (the paper's minimal semantic unit) is one row a of A with the matching column b of B. What a
method decides is a `Mixing`: how the merged units are made of the members'. That, the fidelity
and all norms follow from the units' inner products alone.

Source: Zhao et al., "Merging LoRAs like Playing LEGO", ICLR 2025, arXiv 2409.16167, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from lego_core.adapter import LoraAdapter
from lego_core.errors import IncompatibleAdaptersError
from lego_core.plan import Group
from lego_core.pool import Factors, Pool

_TINY = torch.finfo(torch.float64).tiny
_MAX_GAIN = torch.finfo(torch.float32).max
"""Scaling times weight beyond this is a mistake, and sums may be formed in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """The units of M modules. Unit i of module m is

        a_i = coef_a[m, i] * (row i of the pooled A),  b_i = coef_b[m, i] * (column i of the pooled B)

    so that sum_i b_i a_i^T is exactly the weighted sum of the adapters: the coefficients hold
    scaling, weight and gauge, and the weights themselves are never rewritten.

    Attributes:
        pool: where the weights are.
        coef_a, coef_b: shape [M, N], float64.
        gram_a, gram_b: inner products of the units' halves with the coefficients applied,
            shape [M, N, N], float64. Their sum is the Gram matrix of the vectors [a; b]; their
            entrywise product that of the matrices b a^T.
        peaks: the largest absolute entry of each vector [a; b], shape [M, N], if asked for.
    """

    pool: Pool
    coef_a: torch.Tensor
    coef_b: torch.Tensor
    gram_a: torch.Tensor
    gram_b: torch.Tensor
    peaks: torch.Tensor | None = None

    @property
    def group(self) -> Group:
        """The modules, and whose units these are."""
        return self.pool.group

    def assemble(self, mixing: Mixing, dtype: torch.dtype) -> Factors:
        """Make the merged units: the second pass over the weights."""
        coef_a, coef_b = self.coef_a[:, None, :], self.coef_b[:, None, :]
        return self.pool.mix(mixing.a * coef_a, mixing.b * coef_b, dtype)


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
    """What the fidelity of a merge is made of, each of shape [M], float64.

    Attributes:
        overlap: <merge, sum>, in the Frobenius inner product.
        merged_square: |merge|^2.
        sum_square: |exact weighted sum|^2.
        largest: an upper bound of all absolute entries of the merged factors.
    """

    overlap: torch.Tensor
    merged_square: torch.Tensor
    sum_square: torch.Tensor
    largest: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """The merge of one group.

    Attributes:
        factors: k units per module.
        moments: what is known of them.
        sizes: units per cluster, shape [M, k], for methods that cluster.
    """

    factors: Factors
    moments: Moments
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

    Scaling and weight go to both halves, a by sqrt(|s w|), b by sign(w) sqrt(|s w|). With
    `balance` each unit is rescaled to |a| = |b|; a unit with a zero half is the zero function
    and becomes the zero vector. Norms are taken in the pool's dtype, so halves below 1e-19 or
    above 1e19 count as zero or overflow in float32.

    Args:
        pool: the weights.
        adapters: as given to `plan_merge`.
        weights: one per adapter, finite, of any sign.
        balance: the gauge.
        peaks: whether to find the largest entries too.

    Raises:
        IncompatibleAdaptersError: scaling times weight overflows.
    """
    gain = _gains(pool, adapters, weights)
    coef_a = gain.abs().sqrt()
    coef_b = coef_a * gain.sign()
    grams = pool.grams(peaks=peaks)
    if balance:
        norm_a = coef_a * _diagonal(grams.a).sqrt()
        norm_b = coef_a * _diagonal(grams.b).sqrt()
        alive = (norm_a > 0) & (norm_b > 0)
        stretch = torch.where(alive, (norm_b / norm_a.clamp_min(_TINY)).sqrt(), 0.0)
        coef_a = coef_a * stretch
        coef_b = torch.where(alive, coef_b / stretch.clamp_min(_TINY), 0.0)
    largest = None
    if grams.peak_a is not None and grams.peak_b is not None:
        largest = torch.maximum(coef_a * grams.peak_a, coef_b.abs() * grams.peak_b)
    return Units(
        pool=pool,
        coef_a=coef_a,
        coef_b=coef_b,
        gram_a=coef_a[:, :, None] * grams.a * coef_a[:, None, :],
        gram_b=coef_b[:, :, None] * grams.b * coef_b[:, None, :],
        peaks=largest,
    )


def assembled(units: Units, mixing: Mixing, dtype: torch.dtype) -> Merged:
    """Make the merged units, and account for them."""
    return Merged(units.assemble(mixing, dtype), moments(units, mixing), mixing.sizes)


def moments(units: Units, mixing: Mixing) -> Moments:
    """Return what is known of a merge without its factors."""
    cross_a, cross_b = mixing.a @ units.gram_a, mixing.b @ units.gram_b
    product_a, product_b = cross_a @ mixing.a.mT, cross_b @ mixing.b.mT
    squares = torch.maximum(_diagonal(product_a), _diagonal(product_b))
    return Moments(
        overlap=(cross_a * cross_b).sum(dim=(1, 2)),
        merged_square=(product_a * product_b).sum(dim=(1, 2)),
        sum_square=sum_square(units),
        largest=squares.amax(dim=1).sqrt(),
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


def _gains(pool: Pool, adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> torch.Tensor:
    """Return scaling times weight of each unit, shape [M, N]."""
    group = pool.group
    rows = [
        [adapters[i].modules[name].scaling * weights[i] for i in group.members]
        for name in group.names
    ]
    gain = torch.tensor(rows, dtype=torch.float64)
    if not gain.abs().amax() <= _MAX_GAIN:
        _refuse_gain(group, adapters, weights)
    gain = gain.to(pool.device, non_blocking=True)
    ranks = torch.tensor(group.ranks).to(pool.device, non_blocking=True)
    return gain.repeat_interleave(ranks, dim=1, output_size=group.n_units)


def _refuse_gain(group: Group, adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> None:
    for i in group.members:
        for name in group.names:
            scaling = adapters[i].modules[name].scaling
            if not abs(scaling * weights[i]) <= _MAX_GAIN:
                raise IncompatibleAdaptersError(
                    f"adapter {adapters[i].name!r}, module {name!r}: scaling {scaling:g} times "
                    f"weight {weights[i]:g} overflows"
                )


def _diagonal(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal(dim1=1, dim2=2)
