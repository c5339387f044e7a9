"""Step 4 to 6 of LoRA-LEGO: centroids, the two reweightings, and how good the merge is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lego_core.config import MergeConfig
from lego_core.units import Stack


@dataclass(frozen=True, slots=True, eq=False)
class Reassembled:
    """The merged units of M modules and what is known of them.

    Attributes:
        a: shape [M, k, in_features].
        b: shape [M, k, out_features].
        overlap: <merge, sum> per module, in the Frobenius inner product, shape [M], float64.
        merged_square: |merge|^2, shape [M].
        sum_square: |exact weighted sum|^2, shape [M].
    """

    a: torch.Tensor
    b: torch.Tensor
    overlap: torch.Tensor
    merged_square: torch.Tensor
    sum_square: torch.Tensor


def reassemble(stack: Stack, signs: torch.Tensor, config: MergeConfig, rank: float) -> Reassembled:
    """Average the units of each cluster and rescale.

    Args:
        stack: the units.
        signs: their clusters, shape [M, k, N], as `cluster_units` returns them.
        config: which reweightings.
        rank: r of the output reweighting, the mean rank of the sources.

    Returns:
        k units per module, in the stack's dtype; an empty cluster gives a zero unit.
    """
    sizes = signs.abs().sum(dim=2)
    means = signs / sizes.clamp_min(1)[:, :, None]
    a = (means * stack.coef_a[:, None, :]).to(stack.a.dtype) @ stack.a
    b = (means * stack.coef_b[:, None, :]).to(stack.b.dtype) @ stack.b

    gain = torch.ones_like(sizes)
    if config.parameter_reweighting != "off":
        gain = _norm_gain(stack, signs, sizes, a, b, config)
    output_gain = 1.0
    if config.output_reweighting:
        clusters = min(config.rank, signs.shape[2])
        output_gain = (rank / clusters) ** 0.5
    a = a * gain[:, :, None].to(a.dtype)
    b = b * (gain * output_gain)[:, :, None].to(b.dtype)

    mix_a = means * gain[:, :, None]
    mix_b = mix_a * output_gain
    sum_square = (stack.gram_a * stack.gram_b).sum(dim=(1, 2))
    # A sum whose members cancel is zero up to the rounding of the inner products.
    largest = _unit_squares(stack.gram_a) * _unit_squares(stack.gram_b)
    rounding = torch.finfo(stack.a.dtype).eps ** 2 * largest.sqrt().sum(dim=1).square()
    cross_a, cross_b = mix_a @ stack.gram_a, mix_b @ stack.gram_b
    return Reassembled(
        a=a,
        b=b,
        overlap=(cross_a * cross_b).sum(dim=(1, 2)),
        merged_square=((cross_a @ mix_a.mT) * (cross_b @ mix_b.mT)).sum(dim=(1, 2)),
        sum_square=sum_square.where(~(sum_square <= rounding), 0),
    )


def _norm_gain(
    stack: Stack,
    signs: torch.Tensor,
    sizes: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    config: MergeConfig,
) -> torch.Tensor:
    """Mean norm of each cluster's members over the norm of its centroid, shape [M, k].

    A centroid that is nothing but the rounding of members that cancel becomes zero.
    """
    if config.parameter_reweighting == "l2":
        unit_norms = _unit_squares(stack.gram_a + stack.gram_b).sqrt()
        centroid_norms = (a.double().square().sum(2) + b.double().square().sum(2)).sqrt()
    else:
        unit_norms = torch.maximum(
            stack.coef_a.abs() * stack.a.abs().amax(2), stack.coef_b.abs() * stack.b.abs().amax(2)
        )
        centroid_norms = torch.maximum(a.abs().amax(2), b.abs().amax(2)).double()
    wanted = (signs.abs() @ unit_norms[:, :, None])[:, :, 0] / sizes.clamp_min(1)
    rounding = 16 * torch.finfo(a.dtype).eps * wanted
    return torch.where(
        centroid_norms > rounding,
        wanted / centroid_norms.clamp_min(1e-300),
        torch.zeros_like(wanted),
    )


def _unit_squares(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal(dim1=1, dim2=2).clamp_min(0)
