"""Methods by singular values, on the units' inner products alone.

With eigenvectors A A^T = Q_a L_a Q_a^T the rows of E_a = L_a^(-1/2) Q_a^T A are an orthonormal basis of
the units' row space, and B likewise. In these bases the sum of any units is a small matrix, the
core C = L_b^(1/2) Q_b^T Q_a L_a^(1/2), and a singular value decomposition of the core is one of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lego_core.config import MergeConfig
from lego_core.elementwise import ties_mean
from lego_core.pool import Units
from lego_core.units import Merged, Mixing, assembled, refuse_overflow, sum_square

_CUT = 1e-13
"""Eigenvalues of a float64 Gram matrix below this share of the largest are rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Orthonormal bases of the halves of M modules.

    Attributes:
        expand: shape [M, N, N]; unit i is sum_j expand[m, i, j] e_j.
        make: shape [M, N, N]; e_j is sum_i make[m, j, i] of unit i.
        sizes: vectors of each basis, shape [M]: the last ones, those before them are zeros.
    """

    expand: torch.Tensor
    make: torch.Tensor
    sizes: torch.Tensor


def basis(gram: torch.Tensor) -> Basis:
    """Return an orthonormal basis of vectors with these inner products, shape [M, N, N]."""
    values, vectors = torch.linalg.eigh(gram)
    alive = values > _CUT * values[:, -1:]
    roots = values.clamp_min(0).sqrt() * alive
    inverse = torch.where(alive, 1 / roots.clamp_min(torch.finfo(gram.dtype).tiny), 0.0)
    return Basis(vectors * roots[:, None, :], inverse[:, :, None] * vectors.mT, alive.sum(dim=1))


def truncated(core: torch.Tensor, in_a: Basis, in_b: Basis, rank: int) -> Mixing:
    """Return the best approximation of this rank of matrices given in two bases.

    Args:
        core: shape [M, N, N], rows in the basis of b, columns in that of a.
        in_a: basis of the halves a.
        in_b: basis of the halves b.
        rank: k. What is above N is zero.
    """
    left, values, right = torch.linalg.svd(core)
    kept = min(rank, core.shape[1])
    roots = values[:, :kept, None].sqrt()
    fill = (0, 0, 0, rank - kept)
    a = torch.nn.functional.pad(roots * (right[:, :kept] @ in_a.make), fill)
    b = torch.nn.functional.pad(roots * (left.mT[:, :kept] @ in_b.make), fill)
    return Mixing(a, b)


def svd(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Keep the k leading singular triples of the weighted sum."""
    in_a, in_b = _bases(units)
    core = in_b.expand.mT @ in_a.expand
    return assembled(units, truncated(core, in_a, in_b, config.rank), dtype)


def core_space(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Merge the members' cores by TIES, then keep the k leading singular triples.

    The paper merges cores by several known rules; with the plain sum the result is `svd`.
    """
    in_a, in_b = _bases(units)
    cores = torch.stack(
        [in_b.expand[:, of].mT @ in_a.expand[:, of] for of in units.group.columns], dim=1
    )
    merged = torch.zeros_like(cores[:, 0])
    sizes = torch.stack([in_b.sizes, in_a.sizes], dim=1).tolist()
    for of_module, out, (rows, columns) in zip(cores, merged, sizes, strict=True):
        if rows and columns:
            alive = of_module[:, -rows:, -columns:]
            out[-rows:, -columns:] = ties_mean(alive, config.density)
    return assembled(units, truncated(merged, in_a, in_b, config.rank), dtype)


def _bases(units: Units) -> tuple[Basis, Basis]:
    """Return bases of the halves a and b, once it is known that they can be computed."""
    finite = sum_square(units).isfinite()
    if not finite.all():
        refuse_overflow(units.group.names[int(finite.int().argmin())])
    return basis(units.gram_a), basis(units.gram_b)
