"""Methods that compare the members' dense updates entry by entry: TIES and DARE.

They need matrices that inner products do not determine, so they work module after module and cost
far more than the rest. Chosen for comparison, not for speed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from lego_core.config import MergeConfig
from lego_core.pool import Factors, TorchPool, Units
from lego_core.units import Merged, Moments, refuse_overflow, sum_square

_OVERSAMPLING = 16
_POWER_STEPS = 6

ModuleMerge = Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def ties_mean(deltas: torch.Tensor, density: float) -> torch.Tensor:
    """Trim, elect signs and average what agrees (TIES, arXiv 2306.01708, algorithm 1, lambda 1).

    Args:
        deltas: one matrix per member, shape [T, rows, columns].
        density: share of each member's entries to keep, the largest.

    Returns:
        Shape [rows, columns].
    """
    return elected_mean(torch.stack([_largest(delta, density) for delta in deltas]))


def ties(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Merge the dense updates by TIES, cut to rank k."""

    def merge(name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deltas = torch.stack([b[:, of] @ a[of] for of in units.group.columns])
        return _cut(ties_mean(deltas, config.density), a, config.rank, name)

    return _module_by_module(units, config.rank, dtype, merge)


def dare_ties(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Drop entries of the dense updates at random, rescale the rest, elect and average, cut to rank k.

    The draws depend on the seed, the module's name and the member's place in the canonical
    order, and on the kind of device.
    """

    def merge(name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(a.device).manual_seed(config.seed ^ zlib.crc32(name.encode()))
        deltas = []
        for of in units.group.columns:
            delta = b[:, of] @ a[of]
            draws = torch.rand(
                delta.shape, generator=generator, dtype=torch.float32, device=a.device
            )
            kept = draws < config.density
            deltas.append(delta * kept / config.density)
        return _cut(elected_mean(torch.stack(deltas)), a, config.rank, name)

    return _module_by_module(units, config.rank, dtype, merge)


def _module_by_module(units: Units, rank: int, dtype: torch.dtype, merge: ModuleMerge) -> Merged:
    """Apply `merge` to the units of each module, given as a [N, in] and b [out, N].

    Its results, a [j, in] and b [out, j] with j at most the rank, are padded with zeros.
    """
    pool = units.pool
    if not isinstance(pool, TorchPool):
        raise TypeError("elementwise methods read explicit units")
    factors = Factors.empty(units.group, rank, dtype, pool.device)
    factors.flat.zero_()
    accounts: list[torch.Tensor] = []
    for block, in_block, where in pool.chunks():
        raw_a, raw_b = pool.units(where)
        coef_a, coef_b = (coef[where].to(raw_a.dtype) for coef in (units.coef_a, units.coef_b))
        all_a, all_b = raw_a * coef_a[:, :, None], raw_b * coef_b[:, None, :]
        out_a, out_b = (half[in_block] for half in factors.blocks[block])
        for m, (a, b) in enumerate(zip(all_a, all_b, strict=True)):
            name = units.group.names[where.start + m]
            try:
                merged_a, merged_b = merge(name, a, b)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # numbers are not finite
                refuse_overflow(name)
            out_a[m, : len(merged_a)] = merged_a
            out_b[m, :, : len(merged_a)] = merged_b
            accounts.append(_account(a, b, merged_a, merged_b))
    account = torch.stack(accounts)
    overlap, merged_square = account[:, :-1], account[:, -1]
    return Merged(factors, lambda: Moments(overlap, merged_square, sum_square(units)))


def _account(
    a: torch.Tensor, b: torch.Tensor, merged_a: torch.Tensor, merged_b: torch.Tensor
) -> torch.Tensor:
    """Return <merge, unit i> of each unit, then |merge|^2."""
    overlap = ((merged_a @ a.T).double() * (merged_b.T @ b).double()).sum(dim=0)
    square = ((merged_a @ merged_a.T).double() * (merged_b.T @ merged_b).double()).sum()
    return torch.cat([overlap, square[None]])


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Zero all but the largest entries of a matrix; ties at the threshold stay."""
    kept = max(1, int(density * delta.numel()))
    threshold = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0)


def elected_mean(deltas: torch.Tensor) -> torch.Tensor:
    """Average, entry by entry, the members that are not zero and agree with the sign of the sum."""
    agree = (deltas.sign() == deltas.sum(dim=0).sign()) & (deltas != 0)
    return (deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp_min(1)


def _cut(
    delta: torch.Tensor, a: torch.Tensor, rank: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nearly the best factors of this rank of a dense matrix [out, in].

    Subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4) that starts from the
    members' row space and seeded random directions, instead of a dense SVD.
    """
    width = min(rank + _OVERSAMPLING, *delta.shape)
    generator = torch.Generator(a.device).manual_seed(zlib.crc32(name.encode()))
    extra = torch.randn(delta.shape[1], width, generator=generator, dtype=a.dtype, device=a.device)
    # Of size 1, so that the product neither overflows nor vanishes.
    directions = a / a.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    start = torch.cat([directions.T, extra], dim=1)
    columns = torch.linalg.qr(delta @ start).Q
    for _ in range(_POWER_STEPS):
        rows = torch.linalg.qr(delta.T @ columns).Q
        columns = torch.linalg.qr(delta @ rows).Q
    return _leading(columns, columns.T @ delta, rank)


def _leading(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return balanced factors a [j, in], b [out, j], j <= rank, of the best approximation of b @ a."""
    basis_b, triangle_b = torch.linalg.qr(b)
    basis_a, triangle_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(triangle_b @ triangle_a.T)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    return (roots[:, None] * right[:kept]) @ basis_a.T, basis_b @ (left[:, :kept] * roots)
