"""KnOTS: TIES where the updates have a common output basis (Stoica et al., ICLR 2025, arXiv 2410.19735).

With [D_1 ... D_T] = U S [V_1^T ... V_T^T] member t is U S V_t^T, and the merge U S V^T, where V is the TIES
mean of the V_t. Of B and the A_t only inner products are needed for U and S, all modules of one shape at
once; the V_t, as large as the units once per member, are formed, elected and dropped a few modules
at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lego_core.config import MergeConfig
from lego_core.elementwise import elected_mean
from lego_core.pool import Factors, TorchPool, Units
from lego_core.spectral import basis
from lego_core.units import Merged, Moments, refuse_overflow, sum_square

_BYTES_AT_ONCE = 1 << 28
_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = 1e-7
"""Singular values from float64 Gram matrices below this share of the largest are rounding."""


def knots(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Bring the updates into a common left basis, merge the right vectors by TIES, cut to rank k."""
    group, pool = units.group, units.pool
    if not isinstance(pool, TorchPool):
        raise TypeError("KnOTS reads explicit units")
    squares = sum_square(units)
    _refuse(group.names, squares.isfinite())
    factors = Factors.empty(group, config.rank, dtype, pool.device)
    overlaps, norms = [], []
    for block, in_block, where in pool.chunks():
        raw_a, raw_b = pool.units(where)
        coef_a, coef_b = (coef[where].to(raw_a.dtype) for coef in (units.coef_a, units.coef_b))
        all_a, all_b = raw_a * coef_a[:, :, None], raw_b * coef_b[:, None, :]
        finite = [half.isfinite().flatten(1).all(dim=1) for half in (all_a, all_b)]
        _refuse(group.names[where], finite[0] & finite[1])
        step = max(1, _BYTES_AT_ONCE // (len(group.columns) * all_a[0].nbytes))
        outs = (torch.split(half[in_block], step) for half in factors.blocks[block])
        some = torch.split(all_a, step), torch.split(all_b, step)
        for a, b, out_a, out_b in zip(*some, *outs, strict=True):
            merged_a, merged_b = _merged(a, b, group.columns, config)
            out_a.copy_(merged_a)
            out_b.copy_(merged_b)
            inner = (merged_a @ a.mT).double() * (merged_b.mT @ b).double()
            own = (merged_a @ merged_a.mT).double() * (merged_b.mT @ merged_b).double()
            overlaps.append(inner.sum(dim=1))
            norms.append(own.sum(dim=(1, 2)))
    overlap, norm = torch.cat(overlaps), torch.cat(norms)
    return Merged(factors, lambda: Moments(overlap, norm, squares))


def _merged(
    a: torch.Tensor, b: torch.Tensor, columns: tuple[slice, ...], config: MergeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge units a [M, N, in] and b [M, out, N], a slice of N for each member; k units each."""
    sizes = [half.abs().amax(dim=(1, 2), keepdim=True).clamp_min(_TINY) for half in (a, b)]
    a, b = a / sizes[0], b / sizes[1]  # lest products of products overflow
    in_b = basis(_gram(b.mT))
    own = torch.zeros_like(in_b.expand[0])
    for of in columns:
        own[of, of] = 1
    squares, left = torch.linalg.eigh(in_b.expand.mT @ (_gram(a) * own) @ in_b.expand)
    values = squares.clamp_min(0).sqrt()
    rounding = max(_ROUNDING, 16 * torch.finfo(a.dtype).eps * len(left[0]))
    alive = values > rounding * values[:, -1:]
    values = values * alive
    inverse = torch.where(alive, 1 / values, 0.0)
    right = ((inverse[:, :, None] * left.mT) @ in_b.expand.mT).to(a.dtype)
    members = torch.stack([right[:, :, of] @ a[:, of] for of in columns], dim=1)
    if config.density < 1:
        members = _trimmed(members, alive.sum(dim=1), config.density)
    v = elected_mean(members.transpose(0, 1))
    # The best approximation of U S V^T: U is orthonormal, so that of S V^T.
    squares, turn = torch.linalg.eigh(values[:, :, None] * _gram(v) * values[:, None, :])
    kept = min(config.rank, len(left[0]))
    squares = squares * (squares > _ROUNDING**2 * squares[:, -1:])
    roots, turn = squares[:, -kept:].flip(1).pow(0.25), turn[:, :, -kept:].flip(2)
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    to_a = inverse[:, :, None] * (turn.mT * values[:, None, :])
    to_b = (in_b.make.mT @ left @ turn) * roots[:, None, :]
    fill, size = config.rank - kept, sizes[0].sqrt() * sizes[1].sqrt()
    return (
        torch.nn.functional.pad(size * (to_a.to(a.dtype) @ v), (0, 0, 0, fill)),
        torch.nn.functional.pad(size * (b @ to_b.to(b.dtype)), (0, fill)),
    )


def _trimmed(members: torch.Tensor, alive: torch.Tensor, density: float) -> torch.Tensor:
    """Zero all but each member's largest entries, [M, T, N, in]; of N only `alive` rows count."""
    sizes = members.abs().flatten(2)
    threshold = torch.empty_like(sizes[:, :, :1])
    for rows in sorted(set(alive.tolist())):
        of = alive == rows
        kept = max(1, int(density * rows * members.shape[3]))
        threshold[of] = sizes[of].kthvalue(sizes.shape[2] - kept + 1, dim=2, keepdim=True).values
    return torch.where(members.abs() >= threshold[:, :, :, None], members, 0)


def _refuse(names: Sequence[str], finite: torch.Tensor) -> None:
    if not finite.all():
        refuse_overflow(names[int(finite.int().argmin())])


def _gram(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.double()
    return wide @ wide.mT
