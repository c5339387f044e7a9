"""LoRA-LEGO on functions instead of parameters.

k-means on the vectors [a; b] compares parameters, whose sign and scale are arbitrary: (a, b), (-a, -b) and
(c a, b / c) are one function. As functions, the matrices b a^T, units have the inner products
<b_i a_i^T, b_j a_j^T> = (a_i . a_j)(b_i . b_j): the entrywise product of the two Gram matrices, in which no
gauge is left. A cluster becomes the best approximation of its units' sum by one unit, the leading
singular pair. Nothing is averaged, so no norm is lost that a reweighting would have to give back.
"""

from __future__ import annotations

import torch

from lego_core.cluster import cluster_units
from lego_core.config import MergeConfig
from lego_core.pool import Units
from lego_core.units import Merged, Mixing, assembled

_SQUARINGS = 14
"""Of the power iteration's step: 16384 steps. Pairs whose squared singular values differ by 0.2% are then
told apart to 1e-14; of closer ones a mixture does as well, to 1e-4 of the square."""


def lego_functions(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Cluster the units in function space and keep one singular pair per cluster."""
    member = cluster_units(
        units.gram_a * units.gram_b,
        config.rank,
        align_sign=False,
        restarts=config.restarts,
        seed=config.seed,
        normalize=config.normalize,
    )
    return assembled(units, leading_pairs(units, member), dtype)


def leading_pairs(units: Units, member: torch.Tensor) -> Mixing:
    """Return the leading singular pair of the sum of each cluster's units.

    With m the cluster's mask and K_a, K_b the Gram matrices, v = sum_i x_i a_i is a right singular vector
    if x is an eigenvector of x -> m o K_b (m o K_a x). Clusters are disjoint, so one matrix of
    size N takes this step for all of a module, and its squares 2, 4, 8, ... steps. Whatever v, the
    result is the sum's best approximation with that v, so what has not converged is still sound.

    Args:
        units: the units.
        member: 1 where unit n belongs to cluster c, else 0, shape [M, k, N], float64.

    Returns:
        k units per module, |a| = |b|; zero for a cluster that is empty or whose units cancel.
    """
    same = member.mT @ member
    step = (same * units.gram_b) @ (same * units.gram_a)
    tiny = torch.finfo(step.dtype).tiny
    for _ in range(_SQUARINGS):
        trace = same @ step.diagonal(dim1=1, dim2=2)[:, :, None]  # of each unit's cluster
        step = step * torch.where(trace > tiny, 1 / trace, 0.0)
        step = step @ step
    # What is left are projectors, whose columns are all x; that of the largest trace is safest.
    share = step.diagonal(dim1=1, dim2=2)[:, None, :].masked_fill(member == 0, -torch.inf)
    chosen = share.argmax(dim=2)[:, :, None].expand_as(member)
    x = step.mT.gather(1, chosen) * member
    y = member * (x @ units.gram_a)
    square = (x * y).sum(dim=2, keepdim=True)  # |v|^2
    x, y = x / square.sqrt(), y / square.sqrt()  # now the sum maps v to sum_i y_i b_i
    value = ((y @ units.gram_b) * y).sum(dim=2, keepdim=True).clamp_min(0).sqrt()
    norms = (units.gram_a.diagonal(dim1=1, dim2=2) * units.gram_b.diagonal(dim1=1, dim2=2)).sqrt()
    rounding = torch.finfo(units.pool.dtype).eps * (member @ norms[:, :, None])
    # What overflowed is no number, and not below anything.
    zero = (square <= 0) | (value <= rounding)
    a, b = (half.masked_fill(zero, 0) for half in (x * value.sqrt(), y / value.sqrt()))
    return Mixing(a, b, member.sum(dim=2))
